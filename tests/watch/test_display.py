"""The display of a run, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from trl.watch.diagnosis import Finding
from trl.watch.display import SAMPLE_EVERY, Display

ROW = {
    "reward/mean": 0.5,
    "objective/kl": 3.25,
    "ppo/policy/entropy": 2.5,
    "response/length": 20.0,
    "tokens_per_second": 1234.0,
}
HOSTILE = "[bold]not bold[/bold] \x1b[31mred\x1b[0m \x07 [/nothing]"


def a_console(*, terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def shown(console):
    return console.file.getvalue()


def test_a_log_has_a_line_now_and_then_with_the_figures():
    console = a_console(terminal=False)
    with Display(150, console=console) as display:
        display.row({"step": 0, "held_out/reward/mean": 0.11})
        for step in range(1, 151):
            display.row({"step": step} | ROW)
    lines = shown(console).splitlines()
    assert len(lines) == 17
    assert lines[0] == "step 0/150 · held out +0.11"  # from the first evaluation on
    assert lines[1].startswith(
        "step 1/150 · reward +0.50 · held out +0.11 (step 0) · KL 3.2 nats · entropy 2.50 · "
        "20 tokens long · 1,234 tokens/s · "
    )
    assert lines[-1].startswith("step 150/150")
    assert lines[-1].endswith("0 s left")


def test_a_terminal_has_a_bar_the_figures_and_a_sample():
    console = a_console(terminal=True)
    with Display(8, console=console) as display:
        for step in range(1, 9):
            display.row({"step": step} | ROW)
            display.sample("I saw", f" film {step}", 0.3)
        display.live.refresh()
    text = shown(console)
    assert "8/8" in text
    assert "reward +0.50 · KL 3.2 nats" in text
    assert "I saw → film 6  +0.30" in text  # the first stayed for five steps
    assert "film 7" not in text


def test_a_sample_stays_for_some_steps():
    display = Display(50, console=a_console(terminal=False))
    with display:
        display.sample("a", "first", 1.0)
        for step in range(1, SAMPLE_EVERY + 1):
            assert "first" in display._shown.plain
            display.row({"step": step})
            display.sample("a", f"number {step}", 1.0)
        assert f"number {SAMPLE_EVERY}" in display._shown.plain


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_text_is_shown_as_text(terminal):
    console = a_console(terminal=terminal, width=200)
    with Display(1, console=console) as display:
        display.sample(HOSTILE, HOSTILE, -1.0)
        display.row({"step": 1} | ROW)
        display.finding(Finding("hostile", 1, HOSTILE, (HOSTILE,), HOSTILE))
        display.note(HOSTILE)
    text = shown(console)
    assert text.count("[bold]not bold[/bold]") >= 6
    assert "\x1b[31m" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [1, 12, 30])
def test_a_narrow_terminal_is_no_problem(terminal, width):
    console = a_console(terminal=terminal, width=width)
    with Display(2, console=console) as display:
        display.sample("prompt " * 30, "response " * 30, 0.5)
        display.row({"step": 1} | ROW)
        display.finding(Finding("a", 1, "seen " * 20, ("cause",), "fix"))
        display.row({"step": 2} | ROW)
    assert shown(console)


def test_a_finding_is_a_panel_with_all_that_it_says():
    console = a_console(terminal=False)
    with Display(2, console=console) as display:
        display.finding(Finding("negative_kl", 7, "It is -3.", ("top_k.", "Padding."), "Set it."))
    text = shown(console)
    for part in ("step 7: negative kl", "It is -3.", "1. top_k.", "2. Padding.", "Set it.", "╭"):
        assert part in text


def test_quiet_shows_nothing():
    for terminal in (True, False):
        console = a_console(terminal=terminal)
        with Display(1, console=console, quiet=True) as display:
            display.row({"step": 1} | ROW)
            display.sample("a", "b", 1.0)
            display.note("c")
            display.finding(Finding("a", 1, "b", (), "c"))
        assert shown(console) == ""


def test_a_resumed_run_counts_its_own_time(monkeypatch):
    console = a_console(terminal=False)
    seconds = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("trl.watch.display.time.perf_counter", lambda: next(seconds))
    with Display(102, first_step=100, console=console) as display:
        display.row({"step": 101} | ROW)
        display.row({"step": 102} | ROW)
    assert [line.rsplit(" · ", 1)[1] for line in shown(console).splitlines()] == [
        "10 s left",
        "0 s left",
    ]


def test_figures_that_are_not_numbers_are_left_out():
    console = a_console(terminal=False)
    with Display(1, console=console) as display:
        display.row({"step": 1} | ROW | {"objective/kl": float("nan")})
    assert "KL" not in shown(console)
    assert "reward" in shown(console)


def test_an_error_ends_the_drawing():
    console = a_console(terminal=True)
    display = Display(1, console=console)
    with pytest.raises(KeyboardInterrupt), display:
        raise KeyboardInterrupt
    assert display.live is None
    assert console._live_stack == []
