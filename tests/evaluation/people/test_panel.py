"""The panel, its buttons pressed in Python; and a training beside it."""

import time

import pytest

from tests.evaluation.people.test_scorer import SMALL, quick  # noqa: F401
from tests.families import tiny_model
from tests.training.test_loop import tokenizer
from trl import HumanScorer
from trl.evaluation.people.asking import Stopped, ask, look, wait
from trl.evaluation.people.items import Item
from trl.evaluation.people.panel import Panel
from trl.evaluation.people.store import Store
from trl.training.beside import Beside


def press(box, label):
    (button,) = [each for each in box if label in each.description]
    assert not button.disabled
    button.click()


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s", make=True)
    yield made
    made.close()


def test_what_is_to_be_judged_is_shown_as_text_and_answered_by_buttons(store):
    panel = Panel(store.path, "ann")
    assert "Nothing is to be judged" in panel.item.value  # nobody has asked anything yet
    store.ask("pair")
    chat = [{"role": "user", "content": "Say <b>hello</b>."}]
    asking = ask(store, [Item(chat, ("<script>", "hello"))])
    panel.refresh()
    assert "user: Say &lt;b&gt;hello" in panel.item.value
    assert "&lt;script&gt;" in panel.item.value
    assert "<script>" not in panel.item.value
    assert panel.left.value == "The training waits for 1 of 1."
    labels = [button.description for button in panel.answers.children]
    assert labels == ["A is better", "B is better", "Tie", "Both bad"]
    place = panel.item.value.index
    first = "A" if place("&lt;script") < place("<b>B</b>") else "B"
    press(panel.answers.children, f"{first} is better")
    assert look(asking).answers == [[0]]
    assert panel.said.value == "Stored."
    assert not panel.answers.children
    press([panel.undo], "Undo")
    assert look(asking).answers == [[]]
    press([panel.skip], "Skip")
    assert wait(asking) == [[]]
    panel.close()


@pytest.mark.parametrize(
    ("question", "label", "answer"),
    [("thumbs", "Good", True), ("rating", "4: good", 4), ("best", "All bad", "both_bad")],
)
def test_each_question_has_its_buttons(question, label, answer, store):
    store.ask(question)
    texts = ("a", "b", "c") if question == "best" else ("a",)
    asking = ask(store, [Item("", texts)])
    panel = Panel(store.path)
    labels = [button.description for button in panel.answers.children]
    assert ("C is best" in labels) == (question == "best")
    press(panel.answers.children, label)
    assert look(asking).answers == [[answer]]
    panel.close()


def test_what_is_refused_is_said(store):
    store.ask("thumbs")
    ask(store, [Item("", ("a",))])
    panel = Panel(store.path)
    other = store.join(store.link("ben"))
    store.db.execute("DELETE FROM leases")
    store.vote(other, panel.shown.id, "1", True)
    press(panel.answers.children, "Good")
    assert "judged by somebody else" in panel.said.value
    panel.close()


def until(condition, panel, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        panel.refresh()
        time.sleep(0.02)


def test_a_training_beside_the_panel_is_stopped_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.training.run.write_report", lambda runs, out: out / "report.html")
    scorer = HumanScorer(tmp_path / "votes", page=False)
    run = Beside(
        tiny_model("llama"), SMALL["prompts"], scorer, out=tmp_path / "run", tokenizer=tokenizer(),
        **{k: v for k, v in SMALL.items() if k not in ("prompts", "quiet")} | {"steps": 3},
    )  # fmt: skip
    panel = run.panel

    def judged(count):
        until(lambda: panel.shown is not None or not run.running, panel)
        for _ in range(count):
            press(panel.answers.children, "Good")

    judged(8)
    until(lambda: len(run.history) == 1 and panel.shown is not None, panel)
    judged(2)
    with pytest.raises(RuntimeError, match="look again"):
        run.result()
    press([run.button], "Stop")
    until(lambda: not run.running, panel)
    panel.refresh()
    assert run.status.value == "It was stopped."
    with pytest.raises(Stopped):
        run.result()
    press([run.button], "Go on")
    while run.running:
        judged(panel.shown is not None)
        panel.refresh()
    panel.refresh()
    _, history = run.result()
    assert [row["step"] for row in history] == [1, 2, 3]
    assert run.status.value == "It is at its end."
    assert history[0]["reward/mean"] == 1.0
    assert len(run.history) == 3
    panel.close()


def test_who_is_not_asked_needs_no_panel(tmp_path):
    with pytest.raises(ValueError, match="`reward` must have one HumanScorer, got 0"):
        Beside("m", [""], lambda texts: [0.0 for _ in texts], out=tmp_path)


def test_without_ipywidgets_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"'\.\[notebooks\]'"):
        Panel(tmp_path / "s")
