"""Several runs side by side, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl.report.figures import (
    best_evaluation,
    best_of,
    duration,
    figure_keys,
    figure_name,
    last_figures,
    settings_that_differ,
    shown,
    state,
)
from trl.report.run import Run, read_runs

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, list[str], set[int]]
"""A name, a text for each run, and the runs that are best."""


def compare(runs: Sequence[Path | str]) -> Table:
    """The held-out figures of runs at their last evaluation, and the settings that differ.

    Args:
        runs: Folders of runs; each becomes a column.

    Returns:
        A table for the terminal. The best mean reward is bold and green, unless the runs were
        scored by different rewards.
    """
    from rich.table import Table
    from rich.text import Text

    read = read_runs(runs)
    table = Table(title="Held-out prompts, last evaluation", title_justify="left")
    table.add_column()
    for run in read:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    for section in _sections(read):
        for name, texts, best in section:
            cells = [
                Text(text, style="bold green" if number in best else "")
                for number, text in enumerate(texts)
            ]
            table.add_row(Text(name), *cells)
        table.add_section()
    return table


def compare_markdown(runs: Sequence[Path | str]) -> str:
    """The same as a Markdown table; the best mean reward is bold."""
    read = read_runs(runs)
    lines = [
        f"| | {' | '.join(_escaped(run.name) for run in read)} |",
        f"|---|{'---:|' * len(read)}",
    ]
    for section in _sections(read):
        for name, texts, best in section:
            cells = [
                f"**{_escaped(text)}**" if number in best else _escaped(text)
                for number, text in enumerate(texts)
            ]
            lines.append(f"| {_escaped(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sections(runs: Sequence[Run]) -> list[list[Row]]:
    last = [last_figures(run) for run in runs]
    figures: list[Row] = []
    for key in figure_keys(runs):
        values = [measured.get(key) for measured in last]
        texts = [shown(key, value) for value in values]
        figures.append((figure_name(key), texts, best_of(key, runs, values)))
    peaks = [best_evaluation(run) for run in runs]
    if any(peaks):
        values = [peak and peak[1] for peak in peaks]
        texts = [f"{shown('reward/mean', p[1])} (step {p[0]})" if p else "–" for p in peaks]
        figures.append(("best mean reward", texts, best_of("reward/mean", runs, values)))
    about: list[Row] = [
        ("progress", [state(run) for run in runs], set()),
        ("time", [duration(run.seconds) if run.seconds else "–" for run in runs], set()),
        ("warnings", [str(len(run.warnings)) for run in runs], set()),
        ("algorithm", [run.algorithm or "–" for run in runs], set()),
        ("model", [run.model or "–" for run in runs], set()),
    ]
    told = ("ppo.algorithm", "algorithm", "model.name", "model")
    differing: list[Row] = [
        (key, values, set()) for key, values in settings_that_differ(runs) if key not in told
    ]
    return [section for section in (figures, about, differing) if section]


def _escaped(text: str) -> str:
    text = " ".join(text.split())
    for sign in "\\`*_[]|":
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;")
