"""Samples and figures before and after, for the terminal."""

import io
from pathlib import Path

from rich.console import Console

from trl.report import before_after_tables
from trl.report.run import Run, Sample


def shown(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def sample(prompt, response, reward):
    return Sample(prompt=prompt, response=response, reward=reward)


def test_before_and_after_side_by_side():
    run = Run(Path("run"), "run")
    assert before_after_tables(run) == []
    run.samples = {
        0: [sample("This film", " a [red]bad[/red]\nreally", -1.234)],
        5: [sample("This film", " a good one", 1.5)],
    }
    run.metrics = [
        {"step": 0, "held_out/reward/mean": -1.25, "held_out/reward/positive_probability": 0.25},
        {"step": 5, "held_out/reward/mean": 1.5, "held_out/reward/positive_probability": 0.9125},
    ]
    samples, figures = map(shown, before_after_tables(run))
    for part in ("[red]bad[/red] really", "−1.23", "a good one", "+1.50"):
        assert part in samples
    for part in ("mean reward", "−1.25", "+1.50", "0.250", "0.912"):
        assert part in figures
