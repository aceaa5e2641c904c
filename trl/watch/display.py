"""What a run shows while it goes: a bar with live figures, the last sample, and what was found.

    with Display(steps) as display:
        for step in range(1, steps + 1):
            display.row({"step": step} | loop.step())
            display.sample("I saw", " a film", 0.7)

On a terminal and in Jupyter it is redrawn in place; in a log there is a line now and then. Texts of
a model are shown as they are: no markup in them, and no control character, reaches the terminal.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from trl.watch.diagnosis import Finding
from trl.watch.markdown import visible

__all__ = ["Display"]

LOG_WIDTH = 120
"""Columns of a log, which has no width of its own."""
LOG_LINES = 15
"""Lines in a log for the whole run, about."""
SAMPLE_EVERY = 5
"""Steps that a sample stays, so that it can be read."""
SAMPLE_CHARACTERS = 400
"""Most characters of a prompt, and of a response."""

FIGURES = (
    ("reward/mean", "reward {:+.2f}"),
    ("held_out/reward/mean", "held out {:+.2f}"),
    ("objective/kl", "KL {:.1f} nats"),
    ("ppo/policy/entropy", "entropy {:.2f}"),
    ("response/length", "{:.0f} tokens long"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("loss", "loss {:.3f}"),
    ("accuracy", "accuracy {:.3f}"),
)
"""The figures that are shown, the most telling first."""
UNSIGNED_ZERO = re.compile(r"[+-](0\.0+\b)")


class Display:
    """Shows a run; use it as a context.

    Args:
        steps: Last step of the run.
        first_step: Steps that were done before, when a run goes on.
        console: Where to; None: the standard output.
        quiet: Show nothing. None: in a notebook.
        title: What stands before the bar.
    """

    def __init__(
        self,
        steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        quiet: bool | None = False,
        title: str = "PPO",
    ) -> None:
        if console is None:
            console = Console()
            if not console.is_terminal and not console.is_jupyter:
                console.width = LOG_WIDTH
        console.quiet = console.quiet or (console.is_jupyter if quiet is None else quiet)
        self.steps, self.first_step, self.console = steps, first_step, console
        self.live: Live | None = None
        self._figures: dict[str, float] = {}
        self._of_step: dict[str, int] = {}
        """When each of them was measured."""
        self._step, self._shown_since = first_step, 0
        self._shown: Text | None = None
        self._waiting: Text | None = None
        done = TextColumn("{task.completed}/{task.total}")
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        columns = (TextColumn(title), BarColumn(bar_width=None), done, left)
        self._bar = Progress(*columns, console=console, expand=True)

    def __enter__(self) -> Display:
        self._started = time.perf_counter()
        # The bar's estimate counts the steps of this session only.
        self._task = self._bar.add_task("", total=self.steps, completed=self.first_step)
        if not self.console.quiet and _is_live(self.console):
            crop: Any = {"vertical_overflow": "crop"}
            self.live = Live(console=self.console, get_renderable=self._picture, **crop)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def row(self, row: Mapping[str, Any]) -> None:
        """Show the figures of a step; one of an evaluation alone may lack most of them."""
        before = self._step - self.first_step
        self._step = max(int(row.get("step", self._step)), self._step)
        for name, _ in FIGURES:
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._figures[name] = float(value)
                self._of_step[name] = self._step
        self._bar.update(self._task, completed=self._step)
        every = max(1, (self.steps - self.first_step) // LOG_LINES)
        done = self._step - self.first_step
        due = done == 1 or done // every > before // every or self._step == self.steps
        begins = done == 0 and "held_out/reward/mean" in row  # the first evaluation
        if self.live is None and (begins or (done > before and due)):
            seconds = (time.perf_counter() - self._started) / max(done, 1)
            left = [] if begins else [f"{seconds * (self.steps - self._step):.0f} s left"]
            line = " · ".join([f"step {self._step}/{self.steps}", self._line(), *left])
            self.console.print(Text(line), soft_wrap=True)  # one line in a log, however long
            if self._waiting is not None:
                self.console.print(self._waiting)
                self._waiting = None

    def sample(self, prompt: str, response: str, score: float) -> None:
        """Show a sample, once the last one has been there for some steps."""
        text = Text.assemble(
            (_plain(prompt), "dim"),
            (" → ", "bold"),
            _plain(response),
            (f"  {score:+.2f}", "green" if score > 0 else "red"),
        )
        if self._shown is None or self._step - self._shown_since >= SAMPLE_EVERY:
            self._shown, self._shown_since = text, self._step
        self._waiting = text

    def finding(self, finding: Finding) -> None:
        """Show what a diagnosis has found, above the bar."""
        title = Text(f"step {finding.step}: {finding.name.replace('_', ' ')}")
        self.console.print(Panel(Text(visible(str(finding))), title=title, border_style="yellow"))

    def note(self, text: str) -> None:
        """Show a line of text, above the bar."""
        self.console.print(Text(visible(text)))

    def _line(self) -> str:
        parts = []
        for name, form in FIGURES:
            if name in self._figures:
                told = UNSIGNED_ZERO.sub(r"\1", form.format(self._figures[name]))
                at = self._of_step[name]
                parts.append(told if at == self._step else f"{told} (step {at})")
        return " · ".join(parts)

    def _picture(self) -> Group:
        return Group(self._bar, Text(self._line()), *([self._shown] if self._shown else []))


def _is_live(console: Console) -> bool:
    """Return whether the console can be drawn on again."""
    if console.is_jupyter:  # where rich draws into a widget
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _plain(text: str) -> str:
    """Return a text as one line of limited length, in which signs that cannot be seen are named."""
    line = " ".join(visible(text).split())
    return line if len(line) <= SAMPLE_CHARACTERS else line[: SAMPLE_CHARACTERS - 1] + "…"
