"""Samples and figures before and after, for the terminal."""

import io
import json
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from tests.training.run_folders import KL_NEGATIVE, make_run
from trl.report import before_after_tables, read_runs, write_report
from trl.report.figures import shown as shown_figure
from trl.report.figures import verdict
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
    for part in ("mean reward", "−1.25", "+1.50", "0.25", "0.91"):
        assert part in figures


@pytest.mark.parametrize(
    ("key", "values", "texts"),
    [
        ("reward/mean", [0.0019, -0.4812], ["0.00", "−0.48"]),
        ("reward/mean", [-0.0039, 0.17], ["0.00", "+0.17"]),
        ("reward/mean", [0.0019, -0.0048], ["+0.0019", "−0.0048"]),  # all are small
        ("reward/positive_probability", [0.5253, 0.6709], ["0.53", "0.67"]),
        ("ended", [0.0039, 0.0], ["0.00", "0.00"]),
        ("kl", [-0.04, None], ["0.0", "–"]),
        ("reward/mean", [2_000_000.0, 3.0], ["+2e+06", "+3"]),
    ],
)
def test_figures_of_a_row_have_the_same_decimals(key, values, texts):
    assert [shown_figure(key, value, among=values) for value in values] == texts


@pytest.mark.usefixtures("no_pictures")
def test_a_verdict_says_what_was_gained_at_what_price(tmp_path):
    folder = make_run(tmp_path / "run", warnings=KL_NEGATIVE)
    summary = json.loads((folder / "summary.json").read_text())
    versions = {"trl": "1.0", "torch": "2.13", "threads": "2", "device": "cpu"}
    of_model = {"parameters": 5_322_497, "precision": "bf16", "processes": 2}
    there = summary | of_model | {"versions": versions, "ended": "2026-01-02 03:04"}
    (folder / "summary.json").write_text(json.dumps(there))
    (run,) = read_runs([folder])
    changes = [after.reward - before.reward for before, after in run.pairs]
    mean = statistics.fmean(changes)
    margin = 1.96 * statistics.stdev(changes) / len(changes) ** 0.5
    ends = f"[{mean - margin:+.2f}, {mean + margin:+.2f}]"
    said = (
        f"held-out reward changed by +{mean:.2f} {ends}, KL {run.after['kl']:.1f} nats, 1 warning"
    )
    assert verdict(run) == said
    page = write_report([folder], tmp_path).read_text()
    header = page[page.index("<header>") : page.index("</header>")]
    on = ("cpu, 2 threads, 2 processes", "5.3M parameters, bf16", "trl 1.0, torch 2.13")
    for part in (said, "2026-01-02 03:04", *on):
        assert part in header
    (folder / "samples.jsonl").unlink()
    (folder / "warnings.jsonl").unlink()
    (run,) = read_runs([folder])
    before, after = run.before["reward/mean"], run.after["reward/mean"]
    gain, kl = f"+{after - before:.2f} (from {before:.2f} to {after:.2f})", run.after["kl"]
    assert verdict(run) == f"held-out reward changed by {gain}, KL {kl:.1f} nats, no warnings"
    earlier = next(row for row in run.metrics[1:] if "held_out/reward/mean" in row)
    earlier["held_out/reward/mean"] = after + 1
    best = f"its best was +{after + 1:.2f}, at step {earlier['step']}"
    assert f"{gain} ({best}), KL" in verdict(run)
    run.metrics = run.metrics[:2]
    assert verdict(run) == "nothing measured on held-out prompts since the start, no warnings"
