"""What runs show in the terminal: one before and after, several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trl.report.figures import (
    best_of,
    duration,
    figure_keys,
    figure_name,
    settings_that_differ,
    shown,
)
from trl.report.run import Run, read_runs

SAMPLES = 8
"""Samples in the terminal."""

Row = tuple[str, list[str], set[int]]
"""A name, a text for each run, and the runs that are best."""


def before_after_tables(run: Run) -> list[Table]:
    """Samples and figures on the held-out prompts before and after; none without evaluations."""
    if not run.pairs:
        return []
    samples = Table(title="Samples", title_justify="left", show_lines=True)
    samples.add_column("prompt", ratio=2)
    for side in ("before", "after"):
        samples.add_column(side, ratio=3)
        samples.add_column("reward", justify="right")
    for before, after in run.pairs[:SAMPLES]:
        cells = [Text(" ".join(before.prompt.split()))]
        for sample in (before, after):
            style = "green" if (sample.reward or 0) > 0 else "red"
            cells.append(Text(" ".join(sample.response.split())))
            cells.append(Text(shown("reward/mean", sample.reward), style=style))
        samples.add_row(*cells)
    figures = Table("", title="Held-out prompts", title_justify="left")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right", style="bold")
    for key in figure_keys([run]):
        sides = (shown(key, side.get(key)) for side in (run.before, run.after))
        figures.add_row(Text(figure_name(key)), *sides)
    return [samples, figures]


def compare(runs: Sequence[Path | str]) -> Table:
    """The held-out figures of runs at their last evaluation, and the settings that differ.

    Args:
        runs: Folders of runs; each becomes a column.

    Returns:
        A table for the terminal. The best mean reward is bold and green, unless the runs were
        scored by different rewards.
    """
    read = read_runs(runs)
    table = Table("", title="Held-out prompts, last evaluation", title_justify="left")
    for run in read:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    for section in _sections(read):
        for name, texts, best in section:
            styles = ["bold green" if number in best else "" for number in range(len(texts))]
            table.add_row(Text(name), *map(Text, texts, styles))
        table.add_section()
    return table


def _sections(runs: Sequence[Run]) -> list[list[Row]]:
    figures: list[Row] = []
    for key in figure_keys(runs):
        values = [(run.after or run.before).get(key) for run in runs]
        texts = [shown(key, value) for value in values]
        figures.append((figure_name(key), texts, best_of(key, runs, values)))
    means = [[(f.get("reward/mean"), -step) for step, f in run.evaluations] for run in runs]
    peaks = [max((peak for peak in of if peak[0] is not None), default=None) for of in means]
    if any(peaks):
        texts = [f"{shown('reward/mean', p[0])} (step {-p[1]})" if p else "–" for p in peaks]
        best = best_of("reward/mean", runs, [p and p[0] for p in peaks])
        figures.append(("best mean reward", texts, best))
    about = {
        "progress": [run.state for run in runs],
        "time": [duration(run.seconds) if run.seconds else "–" for run in runs],
        "warnings": [str(len(run.warnings)) for run in runs],
        "algorithm": [run.algorithm or "–" for run in runs],
        "model": [run.model or "–" for run in runs],
    }
    told = ("ppo.algorithm", "model.name")
    differ = {key: values for key, values in settings_that_differ(runs) if key not in told}
    plain: list[list[Row]] = [[(name, of[name], set()) for name in of] for of in (about, differ)]
    return [figures, *plain]
