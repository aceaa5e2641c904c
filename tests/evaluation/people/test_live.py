"""A training whose reward is a person in a browser; skipped where there is none."""

import json
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import trl
from tests.browser import browser  # noqa: F401
from tests.evaluation.people.test_scorer import SMALL
from tests.families import tiny_model
from tests.ranks import launch
from tests.training.test_loop import tokenizer
from trl import HumanScorer
from trl.evaluation.people import asking
from trl.evaluation.people.store import Store
from trl.training import run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = 10
SHOWN = "#answers button, #done:not([hidden])"
UNSEEN, ENOUGH, RELOAD = 4, 6, 8
"""Steps at which nobody answers, somebody says it is enough, the page is loaded again."""


def train_with_a_page(folder):
    """Tune a policy; one batch is waited for only shortly."""
    asking.GRACE = 0.2
    run.write_report = lambda runs, out: out / "report.html"
    scorer = HumanScorer(f"{folder}/votes", port=0)

    def on_step(step, row):
        scorer.timeout = 2.0 if step == UNSEEN - 1 else None

    trl.train(
        tiny_model("llama"), reward=scorer, tokenizer=tokenizer(), out=f"{folder}/run",
        on_step=on_step, **SMALL | {"steps": STEPS},
    )  # fmt: skip


def rows_of(folder):
    path = Path(folder) / "run/metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for row in map(json.loads, lines) if row["step"]]


def link_of(folder, training):
    said = Path(folder) / "stderr-0"
    while training.is_alive():
        if said.is_file() and (found := re.search(r"http://\S+#join=\S+", said.read_text())):
            return found.group()
        time.sleep(0.1)
    raise AssertionError(said.read_text())


def judge(page, folder, training):
    """Answer all that comes up, but at the steps named above."""
    clicked, reloaded = Counter(), False
    while training.is_alive():
        step = len(rows_of(folder)) + 1
        text = page.evaluate("!busy && state && state.item ? state.item.responses[0] : null")
        if step == UNSEEN or text is None:
            time.sleep(0.05)
        elif step == ENOUGH and clicked[step] == 3:
            page.keyboard.press("e")
            clicked[step] += 1
        elif step == RELOAD and clicked[step] == 3 and not reloaded:
            page.reload()
            page.wait_for_selector(SHOWN)
            reloaded = True
        else:
            page.keyboard.press("2" if "w7" in text else "1")
            clicked[step] += 1
            time.sleep(0.02)
    assert reloaded


@pytest.mark.parametrize("world", [1, 2])
def test_ten_steps_judged_on_the_page(world, browser, tmp_path):  # noqa: F811
    ended = []
    training = threading.Thread(
        target=lambda: ended.append(
            launch(train_with_a_page, world, tmp_path, str(tmp_path), timeout=1500)
        )
    )
    training.daemon = True  # it waits for long if this fails
    training.start()
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(link_of(tmp_path, training))
    page.wait_for_selector(SHOWN)
    judge(page, tmp_path, training)
    page.close()
    ((codes, told),) = ended
    assert codes == [0] * world, "\n".join(told)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    left_out = {row["step"]: row["response/counted"] for row in rows if "response/counted" in row}
    assert left_out.keys() == {UNSEEN, ENOUGH}
    assert left_out[UNSEEN] == 0
    assert 0 < left_out[ENOUGH] < 1
    items = list(Store(tmp_path / "votes").items())
    asked = [item for item in items if item.votes]
    assert all([vote.answer for vote in i.votes] == ["w7" in i.responses[0]] for i in asked)
    assert len(asked) < len(items)
    assert told[0].count("#join=") == 2  # to come in, and for another browser
