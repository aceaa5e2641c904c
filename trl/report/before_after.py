"""What a run shows in the terminal at its end: some samples and all figures, before → after."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from trl.report.figures import figure_keys, figure_name, shown
from trl.report.run import Run, Sample

SAMPLES = 8
"""Samples in the terminal."""


def before_after_tables(run: Run) -> list[Table]:
    """Samples and figures on the held-out prompts before and after; none without evaluations."""
    if not run.pairs:
        return []
    return [samples_table(run.pairs[:SAMPLES]), figures_table(run)]


def figures_table(run: Run) -> Table:
    """The held-out figures of a run before and after."""
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column()
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for key in figure_keys([run]):
        before, after = run.before.get(key), run.after.get(key)
        table.add_row(Text(figure_name(key)), shown(key, before), shown(key, after))
    return table


def samples_table(pairs: Sequence[tuple[Sample, Sample]]) -> Table:
    """Prompts with their responses and rewards before and after."""
    table = Table(title="Samples", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("before", ratio=3)
    table.add_column("reward", justify="right")
    table.add_column("after", ratio=3)
    table.add_column("reward", justify="right")
    for before, after in pairs:
        table.add_row(
            Text(_one_line(before.prompt)),
            Text(_one_line(before.response)),
            _coloured(before.reward),
            Text(_one_line(after.response)),
            _coloured(after.reward),
        )
    return table


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _coloured(reward: float | None) -> Text:
    if reward is None:
        return Text("–")
    return Text(f"{reward:+.2f}", style="green" if reward > 0 else "red")
