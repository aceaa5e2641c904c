"""Nobody gets a reward by force, and nothing is left of who tries. The answers: hostile.py."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation import hostile
from tests.evaluation.rollouts import make_rollout
from tests.rows import quick
from trl.evaluation import CodeScorer, JsonScorer, MathScorer, cells, score

AT_ONCE = 64
RIGHT = {
    "code": "def add(a, b): return a + b",
    "prints": "a, b = map(int, input().split())\nprint(a + b)",
    "number": f"\\boxed{{{hostile.NUMBER}}}",
    "formula": f"\\boxed{{{hostile.FORMULA}}}",
    "json": '{"sum": 3, "words": ["a", "aa"]}',
}


@pytest.fixture(scope="module")
def isolated():
    with cells.warden() as one:
        missing = one.missing
    if missing:
        pytest.skip(f"here answers are not kept from {', '.join(missing)}")


def scores(kind, texts, seconds=2.0):
    rollout = make_rollout(*[("", text) for text in texts], lengths=[1] * len(texts))
    if kind in ("code", "prints"):
        tests = hostile.TESTS if kind == "code" else hostile.PRINTS
        scorer = CodeScorer(tests, seconds=seconds)
    elif kind == "json":
        scorer = JsonScorer(hostile.SCHEMA, seconds=seconds)
    else:
        scorer = MathScorer("right", seconds=seconds)
        right = hostile.NUMBER if kind == "number" else hostile.FORMULA
        rollout = replace(rollout, columns={"right": (right,) * len(texts)})
    return score(scorer, rollout).scores.tolist()


def rewarded(kind, texts, seconds=2.0):
    """Return the answers among `texts` that score; one that is right among each part of them."""
    found = []
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        *these, right = scores(kind, [*part, RIGHT[kind]], seconds)
        assert right == 1, "the scorer gives nothing to anybody any more"
        found += [text for text, one in zip(part, these, strict=True) if one != 0]
    return found


def in_cells(wardens):
    """Return the processes that share the network of a warden, which its cells cannot leave."""
    rooms = {os.readlink(f"/proc/{one.process.pid}/ns/net") for one in wardens}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns" / "net") in rooms:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def nothing_left(isolated):
    here = sorted(os.listdir())
    yield
    wardens = [one for (pid, _), some in cells._idle.items() if pid == os.getpid() for one in some]
    if os.geteuid() == 0:  # others may not look
        until = time.monotonic() + 5  # the keeper of the last cell tells that it is over, then ends
        while len(in_cells(wardens)) > 2 * len(wardens) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(in_cells(wardens)) == 2 * len(wardens)  # a launcher and a warden
    cells.end_all()
    assert all(one.process.poll() is not None for one in wardens)
    assert sorted(os.listdir()) == here


@pytest.mark.parametrize(
    "kind", quick(["code", "number", "formula", "json"], "code", "number", "json")
)
def test_a_few_hostile_answers_get_nothing(kind, nothing_left):
    code, maths, json = hostile.few()
    texts = {"code": code, "json": json}.get(kind, maths)
    assert rewarded(kind, texts, seconds=5.0) == []


def test_an_endless_answer_and_one_that_goes_on_after_it_end(nothing_left):
    start = time.monotonic()
    endless = [hostile.LOOPS[0], *hostile.ESCAPES[:2]]
    assert scores("code", endless, seconds=1.0) == [0, 0, 0]
    assert time.monotonic() - start < 20  # of the 99 and 60 that they want, on a busy machine too


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_all_hostile_answers_by_hand_get_nothing(kind, nothing_left):
    code, maths, json = hostile.by_hand()
    quick, slow = {"code": code, "prints": code, "json": json}.get(kind, maths)
    assert len(code[0]) + len(maths[0]) + len(json[0]) > 300
    assert rewarded(kind, quick, seconds=5.0) == []
    for text in slow:
        start = time.monotonic()
        assert scores(kind, [text]) == [0], text
        assert time.monotonic() - start < 2 + 2, text  # what it takes to end it, and to start anew


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "prints"])
def test_no_bomb_and_no_escape_outlives_its_cell(kind, nothing_left):
    assert scores(kind, hostile.ESCAPES) == [0] * len(hostile.ESCAPES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "of", "count"),
    [
        ("code", "code", 2500),
        ("number", "math", 3500),
        ("formula", "math", 1000),
        ("json", "json", 3000),
    ],
)
def test_generated_hostile_answers_get_nothing(kind, of, count, nothing_left):
    assert rewarded(kind, hostile.generated(of, count), seconds=5.0) == []
