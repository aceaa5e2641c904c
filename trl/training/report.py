"""What a run shows at its end: the learning curve, sample continuations, and before → after.

Everything here takes plain Python values, so that a report can be made again from the files of a
run. A sample is a mapping with the keys `prompt`, `before`, `score_before`, `after` and
`score_after`.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = [
    "before_after_summary",
    "distinct_n",
    "plot_learning_curve",
    "samples_markdown",
    "samples_table",
    "summary_markdown",
    "summary_table",
]

Sample = Mapping[str, Any]
Summary = dict[str, tuple[float, float]]

BLUE, ORANGE, INK, GRID = "#2f6db3", "#d9730d", "#2b2f36", "#e3e6ea"

SUMMARY_ROWS = {
    "reward/mean": ("mean reward", "{:+.2f}"),
    "reward/median": ("median reward", "{:+.2f}"),
    "positive": ("mean P(positive)", "{:.3f}"),
    "kl": ("KL to the reference, nats per response", "{:.1f}"),
    "distinct_2": ("distinct-2", "{:.2f}"),
}


def distinct_n(token_lists: Iterable[Sequence[Hashable]], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv:1510.03055): how little a set of texts repeats itself.

        distinct-n = (number of different n-grams) / (number of n-grams), over all texts together

    Deviation: the paper divides by the number of tokens. An n-gram does not reach across two texts.

    Args:
        token_lists: The tokens of each text, special tokens left out.
        n: Length of the n-grams.

    Returns:
        Between 0 and 1; 0 when no text has n tokens.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    grams = [
        tuple(tokens[start : start + n])
        for tokens in token_lists
        for start in range(len(tokens) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def before_after_summary(
    *,
    scores: tuple[Sequence[float], Sequence[float]],
    positive: tuple[Sequence[float], Sequence[float]],
    kl: tuple[Sequence[float], Sequence[float]],
    tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
) -> Summary:
    """The figures of a run on held-out prompts, each as (before, after).

    Args:
        scores: Rewards, one per prompt, before and after.
        positive: P(positive), one per prompt.
        kl: Σ_t (log π − log π_ref) of each response, in nats.
        tokens: Response tokens, one list per prompt.

    Returns:
        reward/mean, reward/median, positive, kl and distinct_2.
    """
    for name, pair in (("scores", scores), ("positive", positive), ("kl", kl), ("tokens", tokens)):
        if not all(len(side) for side in pair):
            raise ValueError(f"`{name}` must hold at least one prompt before and after.")
    return {
        "reward/mean": _both(statistics.fmean, scores),
        "reward/median": _both(statistics.median, scores),
        "positive": _both(statistics.fmean, positive),
        "kl": _both(statistics.fmean, kl),
        "distinct_2": _both(distinct_n, tokens),
    }


def _both(measure: Any, pair: tuple[Any, Any]) -> tuple[float, float]:
    before, after = pair
    return float(measure(before)), float(measure(after))


def summary_table(summary: Summary) -> Table:
    """The summary as a table for the terminal."""
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column()
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for row in _summary_rows(summary):
        table.add_row(*row)
    return table


def summary_markdown(summary: Summary) -> str:
    """The summary as a Markdown table."""
    lines = ["| | before | after |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _summary_rows(summary)]
    return "\n".join(lines) + "\n"


def _summary_rows(summary: Summary) -> list[tuple[str, str, str]]:
    rows = []
    for key, (name, form) in SUMMARY_ROWS.items():
        before, after = summary[key]
        rows.append((name, form.format(before), form.format(after)))
    return rows


def samples_table(samples: Sequence[Sample]) -> Table:
    """Prompts with their continuations and scores before and after, as a table for the terminal."""
    table = Table(title="Samples", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("before", ratio=3)
    table.add_column("score", justify="right")
    table.add_column("after", ratio=3)
    table.add_column("score", justify="right")
    for sample in samples:
        table.add_row(
            Text(_one_line(sample["prompt"])),
            Text(_one_line(sample["before"])),
            _coloured(sample["score_before"]),
            Text(_one_line(sample["after"])),
            _coloured(sample["score_after"]),
        )
    return table


def samples_markdown(samples: Sequence[Sample]) -> str:
    """The samples as a Markdown table."""
    lines = ["| prompt | before | score | after | score |", "|---|---|---:|---|---:|"]
    for sample in samples:
        prompt, before, after = (
            _one_line(sample[key]).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
            for key in ("prompt", "before", "after")
        )
        lines.append(
            f"| {prompt} | {before} | {sample['score_before']:+.2f} "
            f"| {after} | {sample['score_after']:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _coloured(score: float) -> Text:
    return Text(f"{score:+.2f}", style="green" if score > 0 else "red")


def plot_learning_curve(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw reward, KL and diversity against PPO steps, and save the picture.

    Diversity is the held-out distinct-2 where it was measured, else the policy's entropy.

    Args:
        metrics: Rows as in `metrics.jsonl`: `step`, and any of `reward/mean`, `reward/std`,
            `objective/kl`, `ppo/policy/entropy`, `held_out/reward/mean`, `held_out/kl` and
            `held_out/distinct_2`. A row need not have every key.
        path: File to write; its suffix (.png, .svg, .pdf) chooses the format.
    """
    if not metrics:
        raise ValueError("`metrics` must hold at least one row.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(wspace=0.06)
    FigureCanvasAgg(figure)
    reward, kl, diversity = figure.subplots(1, 3)

    _band(reward, metrics, "reward/mean", "reward/std")
    _line(reward, metrics, "reward/mean", BLUE, "training batch")
    _points(reward, metrics, "held_out/reward/mean")
    _dress(reward, "Reward", "score of the response")
    if reward.get_legend_handles_labels()[0]:  # the other panels use the same colours
        reward.legend(fontsize=8.5, frameon=False, loc="best", labelcolor=INK)

    _line(kl, metrics, "objective/kl", BLUE, "training batch")
    _points(kl, metrics, "held_out/kl")
    kl.set_ylim(bottom=min(0.0, kl.get_ylim()[0]))
    _dress(kl, "KL to the reference", "nats per response")

    if _series(metrics, "held_out/distinct_2")[0]:
        _points(diversity, metrics, "held_out/distinct_2")
        diversity.set_ylim(0, 1)
        _dress(diversity, "Distinct-2", "different / all bigrams")
    else:
        _line(diversity, metrics, "ppo/policy/entropy", BLUE, "training batch")
        diversity.set_ylim(bottom=0)
        _dress(diversity, "Entropy of the policy", "nats per token")

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], float(row[key])) for row in metrics if row.get(key) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _line(
    axes: Any, metrics: Sequence[Mapping[str, Any]], key: str, colour: str, label: str
) -> None:
    steps, values = _series(metrics, key)
    if steps:
        marker = "o" if len(steps) == 1 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=label)


def _band(axes: Any, metrics: Sequence[Mapping[str, Any]], mean: str, spread: str) -> None:
    rows = [row for row in metrics if row.get(mean) is not None and row.get(spread) is not None]
    steps = [row["step"] for row in rows]
    low = [row[mean] - row[spread] for row in rows]
    high = [row[mean] + row[spread] for row in rows]
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.12, linewidth=0, label="± 1 std")


def _points(axes: Any, metrics: Sequence[Mapping[str, Any]], key: str) -> None:
    steps, values = _series(metrics, key)
    if steps:
        axes.plot(
            steps, values, "o-", color=ORANGE, markersize=5, linewidth=1.2, label="held-out prompts"
        )


def _dress(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel("PPO step", fontsize=10, color=INK)
    axes.set_ylabel(unit, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
