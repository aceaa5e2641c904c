import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.rollouts import make_rollout
from trl.evaluation import CodeScorer, ScoringError, cells, score

ADD = "def add(a, b):\n    return a + b"
TESTS = ["import math", "assert add(1, 2) == 3", "assert math.isclose(add(0.1, b=0.2), 0.3)"]
SORTED = """
def check(candidate):
    assert candidate([3, 1, 2]) == [1, 2, 3]
    try:
        candidate(None)
    except TypeError as error:
        assert "NoneType" in str(error)
    else:
        raise AssertionError("nothing raised")
"""


@pytest.fixture(autouse=True, scope="module")
def shut_in():
    with cells.warden() as one:
        missing = one.missing
    if missing:
        pytest.skip(f"here answers are not kept from {', '.join(missing)}")


def scored(texts, tests, **settings):
    rollout = make_rollout(*[("", text) for text in texts], lengths=[1] * len(texts))
    rollout = replace(rollout, columns={"tests": (tests,) * len(texts)})
    return score(CodeScorer(**{"seconds": 10.0} | settings), rollout)


def test_functions_are_called_and_judged_elsewhere():
    point = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 0\n"
    found = scored(
        [ADD, f"It is\n```python\n{ADD}\n```\n.", point + ADD, ADD.replace("+", "-")], TESTS
    )
    assert found.scores.tolist() == [1, 1, 1, 0]
    assert found.figures["passed"].tolist() == [1, 1, 1, 0]


def test_the_share_of_tests_may_count():
    texts = ["def add(a, b): return 3", ADD, ""]
    assert scored(texts, TESTS, share=True).scores.tolist() == [0.5, 1, 0]
    assert scored(texts, TESTS).scores.tolist() == [0, 1, 0]


def test_tests_may_be_a_function_that_checks_and_see_what_was_raised():
    texts = ["def up(x): return sorted(x)", "def up(x): return sorted(x or [])", "up = sorted"]
    assert scored(texts, [SORTED, "check(up)"]).scores.tolist() == [1, 0, 1]


def test_tests_see_values_too_and_every_kind_of_literal():
    code = "N = (1, {'a': {2}}, b'c', None, 1.5)\ndef same(x): return x"
    assert scored([code], ["assert N[1] == {'a': {2}}", "assert same(N) == N"]).scores.tolist() == [
        1
    ]


def test_a_script_is_judged_by_what_it_prints_and_how_it_ends():
    tests = [{"input": "1 2", "output": "3"}, {"input": "4 5\n", "output": "9\n\n"}]
    good = "a, b = map(int, input().split())\nprint(a + b)"
    found = scored([good, f"{good}\n1 / 0", "print(3)", f"{good}\nprint('!')"], tests)
    assert found.scores.tolist() == [1, 0, 0, 0]
    assert found.figures["passed"].tolist() == [1, 0, 0.5, 0]


def test_code_has_no_file_no_network_and_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "s")
    (tmp_path / "right").write_text("3")
    look = f"""
import os, socket
print(sorted(os.environ), os.path.exists({str(tmp_path)!r}), os.getcwd() == os.environ["HOME"])
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    print(error.strerror)
try:
    open("/usr/x", "w")
except OSError as error:
    print(error.strerror)
open("mine", "w").write("x")
print(sorted(os.listdir()), os.getuid() != 0)
"""
    seen = """['HOME', 'LANG', 'PATH', 'TMPDIR'] False True
Network is unreachable
Read-only file system
['input', 'mine'] True"""
    found = scored([look], [{"input": "", "output": seen}])
    assert found.scores.tolist() == [1]


def test_processes_and_memory_have_limits():
    code = """
import os, time
started = 0
try:
    while started < 50:
        if os.fork() == 0:
            time.sleep(60)
        started += 1
except OSError:
    print(started < 10)
try:
    bytearray(2**31)
except MemoryError:
    print("full")
"""
    assert scored([code], [{"input": "", "output": "True\nfull"}]).scores.tolist() == [1]


def test_any_number_of_threads_may_score():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scored([ADD, ""], TESTS).scores.tolist(), range(4)))
    assert found == [[1, 0]] * 4


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        ([], r"`tests` must be Python with assert, or \{'input'"),
        (["assert 1", {"input": "", "output": ""}], "one or more of a kind"),
        (3, "`tests` must be Python with assert.*, got 3"),
        (["import math"], r"`tests` must hold at least one that can fail, got \['import math'\]"),
    ],
)
def test_what_is_no_test_is_named(tests, told):
    with pytest.raises(ScoringError, match=told):
        scored([ADD], tests)


def test_without_a_world_of_its_own_code_runs_by_permission_only(monkeypatch):
    class Bare(cells.Warden):
        def __init__(self, modules, isolated=True):
            super().__init__(modules, isolated=False)

    cells.end_all()
    monkeypatch.setattr(cells, "Warden", Bare)
    with pytest.raises(
        ValueError, match="code is not kept from other processes, the network, files"
    ):
        CodeScorer()
    with pytest.warns(UserWarning, match="CodeScorer runs code that is not kept from other proc"):
        CodeScorer(TESTS, allow_unisolated=True)
    leaves = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\n" + ADD
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    assert scored([ADD, leaves], TESTS, allow_unisolated=True).scores.tolist() == [1, 1]
    cells.end_all()


def test_what_left_its_group_is_found_without_namespaces():
    one = cells.Warden([], isolated=False)
    code = """
import os, time
leaves, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.write(told, b"x")
    time.sleep(60)
os.read(leaves, 1)
os.system("sleep 60 &")
print("ready", flush=True)
"""
    until = time.monotonic() + 20
    with cells.Cell(one, "script", until=until, code=code, text="") as cell:
        assert cell.socket.recv(5) == b"ready"
        keeper = children(children(one.process.pid)[0])[0]
        there = descendants(keeper)
        cell.end()
    assert len(there) >= 3  # the script, what it left behind, and the shell's
    assert not [each for each in there if Path(f"/proc/{each}/cmdline").is_file()]
    one.end()


def children(process):
    return [
        int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def descendants(process):
    return [each for child in children(process) for each in (child, *descendants(child))]
