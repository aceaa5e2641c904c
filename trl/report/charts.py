"""The charts of one or several runs: a table of what to draw, filled with the figures of the runs.

With one run the colours tell curves apart, with several they tell the runs apart. trl/report/
drawing.py draws what is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from trl.report.run import COUNTS, PHASES, Run

MOST_POINTS = 400
"""A longer curve is drawn as means over blocks of steps."""
MOST_BANDS = 3
"""With more runs than this, bands would hide each other."""
BINS = 24

NOT_SCORERS = {f"reward/{name}" for name in ("mean", "std", "median", "min", "max")}


@dataclass(frozen=True, slots=True)
class Curve:
    """Figures against steps (or another `x`)."""

    label: str
    run: int
    """Which run, from 0."""
    style: int
    """Which colour and line style."""
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    kind: Literal["line", "points", "stairs"] = "line"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: where its figures are in the rows of a run, and their curves."""

    unit: str
    key: str = ""
    held_out: str = ""
    spread: str = ""
    scale: float = 1.0
    floor: float | None = None
    """The axis of y reaches down to this at least."""
    bottom: float | None = None
    """The axis of y reaches down to this at most."""
    curves: Sequence[Curve] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its explanation."""

    title: str
    note: str
    panels: Sequence[Panel] = ()
    x_label: str = "step"
    fill: Callable[[Chart, Sequence[Run]], Chart | None] | None = None
    """Returns the chart with curves in its panels, or None; without it, figures over the steps."""
    missed: bool = True
    """Whether to say so if there is nothing to draw."""

    @property
    def legend(self) -> list[Curve]:
        """A curve for each label; none if there is nothing to tell apart."""
        curves = {curve.label: curve for panel in self.panels for curve in panel.curves}
        return list(curves.values()) if len(curves) > 1 else []


def charts_of(runs: Sequence[Run]) -> tuple[dict[str, Chart], list[str]]:
    """Fill the charts with some runs.

    Returns:
        The charts by name, in the order to show them, and the titles of those with nothing to draw.
    """
    filled = {name: (chart.fill or over_steps)(chart, runs) for name, chart in CHARTS.items()}
    drawn = {name: chart for name, chart in filled.items() if chart is not None}
    absent = [chart for name, chart in CHARTS.items() if name not in drawn and chart.missed]
    return drawn, [chart.title for chart in absent]


def series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, NaN where it is there and no number; empty if it never is."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not any(math.isfinite(value) for _, value in points):
        return [], []
    return [step for step, _ in points], [value for _, value in points]


def thin(values: Sequence[float] | np.ndarray[Any, Any], most: int = MOST_POINTS) -> list[float]:
    """Means over blocks of equal size, so many that at most `most` remain; NaN is left out."""
    size = max(1, math.ceil(len(values) / most))
    blocks = [np.array(values[start : start + size]) for start in range(0, len(values), size)]
    there = [block[np.isfinite(block)] for block in blocks]
    return [float(block.mean()) if block.size else math.nan for block in there]


def histogram(
    groups: Sequence[Sequence[float]], bins: int = BINS
) -> tuple[list[float], list[list[float]]]:
    """Share of each group in bins of equal width over the range of all groups together.

    A value on the border of two bins is in the upper one; the highest value is in the last bin.

    Args:
        groups: Finite values; each group holds at least one.
        bins: Number of bins.

    Returns:
        bins + 1 edges, and `bins` shares for each group, which add up to 1.
    """
    low, high = min(map(min, groups)), max(map(max, groups))
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):  # equal, or nearer than a chart can tell
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    return edges.tolist(), [(np.histogram(g, edges)[0] / len(g)).tolist() for g in groups]


def over_steps(chart: Chart, runs: Sequence[Run]) -> Chart | None:
    """Fill a chart with the figures of its panels over the steps."""
    panels: list[Panel] = []
    said = [chart.note]
    for panel in chart.panels:
        curves = [curve for run in runs for curve in _curves(panel, run, runs)]
        values = {value for curve in curves for value in curve.y}
        if panels and len(values) == 1:  # said, not drawn
            said.append(f"{panel.unit.capitalize()}: {values.pop():.3g} throughout.")
        elif curves:
            panels.append(replace(panel, curves=curves))
        elif panel is chart.panels[0]:  # what the others are about
            return None
    if not panels:
        return None
    curves = [curve for panel in panels for curve in panel.curves]
    kinds = {curve.kind for curve in curves}
    if len(kinds) > 1 and len(runs) > 1:
        said.insert(1, "Lines: training batches; dots: held-out prompts.")
    if "line" in kinds and max(len(run.metrics) for run in runs) > MOST_POINTS:
        said.append(f"Lines of more than {MOST_POINTS} steps are means over blocks of steps.")
    if any(curve.low for curve in curves):
        said.append("The band is ± 1 standard deviation of the responses.")
    return replace(chart, note=" ".join(said), panels=panels)


def _curves(panel: Panel, run: Run, runs: Sequence[Run]) -> Iterator[Curve]:
    """What there is of one run in a panel: training batches, and held-out prompts."""
    alone = len(runs) == 1
    steps, values = series(run.metrics, panel.key)
    if steps:
        y = panel.scale * np.array(values)
        _, spreads = series([row for row in run.metrics if panel.key in row], panel.spread)
        with_band = len(spreads) == len(values) and len(runs) <= MOST_BANDS
        low, high = (thin(y - spreads), thin(y + spreads)) if with_band else (None, None)
        label = "training batch" if alone else run.name
        yield Curve(label, run.number, run.number, thin(steps), thin(y), low, high)
    steps, values = series(run.metrics, panel.held_out)
    if steps:
        label, style = ("held-out prompts", 1) if alone else (run.name, run.number)
        yield Curve(label, run.number, style, thin(steps), thin(values), kind="points")


def by_name(chart: Chart, runs: Sequence[Run], group: str = "reward/") -> Chart | None:
    """Fill a chart with a panel for each figure of a group, if there are several."""
    there = dict.fromkeys(key for run in runs for row in run.metrics for key in row)
    keys = [key for key in there if key.startswith(group) and key not in NOT_SCORERS]
    panels = [Panel(key.removeprefix(group), key, f"held_out/{key}") for key in keys]
    return over_steps(replace(chart, panels=panels), runs) if len(keys) > 1 else None


def reward_against_kl(chart: Chart, runs: Sequence[Run]) -> Chart | None:
    """Fill a chart with a point for each evaluation."""
    curves = []
    for run in runs:
        both = [
            (f["kl"], f["reward/mean"]) for _, f in run.evaluations if {"kl", "reward/mean"} <= {*f}
        ]
        if len(both) > 1:
            kl, reward = map(list, zip(*both, strict=True))
            label, style = ("held-out prompts", 1) if len(runs) == 1 else (run.name, run.number)
            curves.append(Curve(label, run.number, style, kl, reward, kind="points"))
    return replace(chart, panels=[Panel("score", curves=curves)]) if curves else None


def spread_of_scores(chart: Chart, runs: Sequence[Run]) -> Chart | None:
    """Fill a chart with the scores at the first, the middle and the last step of each run."""
    chosen = [
        (run, {steps[0]: "first", steps[len(steps) // 2]: "middle", steps[-1]: "last"})
        for run in runs
        if (steps := sorted(run.scores))
    ]
    if not chosen:
        return None
    edges, shares = histogram([run.scores[step] for run, when in chosen for step in when])
    found = iter(shares)
    panels = []
    for run, when in chosen:
        curves = [
            Curve(
                f"step {step}" if len(runs) == 1 else word,
                *(run.number, style, [edges[0], *edges]),
                [0.0, *(100 * share for share in next(found)), 0.0],
                kind="stairs",
            )
            for style, (step, word) in enumerate(when.items())
        ]
        unit = "responses, %" if len(runs) == 1 else run.name
        panels.append(Panel(unit, floor=0, curves=curves))
    return replace(chart, panels=panels)


CHARTS = {
    "reward": Chart(
        "Reward",
        "Score of the response, before the KL penalty.",
        [Panel("score", "reward/mean", "held_out/reward/mean", "reward/std")],
    ),
    "kl": Chart(
        "KL to the reference",
        "How far the policy has moved from where it started. The sum over a response of "
        "log π − log π_ref, which is below 0 in some; their average is shown, and cannot stay "
        "below 0 if sampling and scoring agree.",
        [
            Panel("nats per response", "objective/kl", "held_out/kl", floor=0),
            Panel("coefficient", "objective/kl_coef", floor=0),
        ],
    ),
    "reward-against-kl": Chart(
        "Reward against KL",
        "What reward each evaluation on held-out prompts has bought, and how far the policy moved "
        "for it. Higher at the same KL is better.",
        x_label="KL, nats per response",
        fill=reward_against_kl,
    ),
    "scores": Chart(
        "Scores of a batch",
        "How the scores of a batch spread at the first, middle and last step, in % of responses.",
        x_label="score",
        fill=spread_of_scores,
    ),
    "scorers": Chart(
        "Score by scorer",
        "Each scorer's part, before it is weighted.",
        fill=by_name,
        missed=False,  # one scorer alone has no chart of its own
    ),
    "accuracy": Chart(
        "Accuracy",
        "Share of the held-out responses that all checks of the reward call right.",
        [Panel("share", held_out="held_out/accuracy", floor=0)],
        missed=False,
    ),
    "episodes": Chart(
        "Turns and tool calls",
        "Of an episode, on average; and how many of its calls failed.",
        [
            Panel(name.replace("_", " "), f"episode/{name}", f"held_out/episode/{name}", floor=0)
            for name in COUNTS
        ],
        missed=False,
    ),
    "stops": Chart(
        "How episodes end",
        "Share of the episodes that ended for each reason.",
        fill=partial(by_name, group="stop/"),
        missed=False,
    ),
    "entropy": Chart(
        "Entropy of the policy",
        "How undecided the policy is at each token. If it falls to 0, all responses are the same.",
        [Panel("nats per token", "ppo/policy/entropy", floor=0)],
    ),
    "length": Chart(
        "Response length",
        "Tokens of a response, and the share of responses that ended by themselves.",
        [
            Panel("tokens", "response/length", "held_out/length", floor=0),
            Panel("ended, %", "response/ended", scale=100, floor=0),
        ],
    ),
    "diversity": Chart(
        "Distinct-2",
        "Different bigrams among all of the held-out responses: how little these repeat.",
        [Panel("share", held_out="held_out/distinct_2")],
    ),
    "clipfrac": Chart(
        "Clip fraction",
        "Share of tokens whose probability moved beyond the clip range within a step, and "
        "approximate KL, in nats, between the policy before and after the update, with its target "
        "at the end where the learning rate sets itself.",
        [
            Panel("clipped, %", "ppo/policy/clipfrac", scale=100, floor=0),
            Panel("approx. KL", "ppo/policy/approxkl", floor=0),
            Panel("KL target", "ppo/auto_rate/target", floor=0),
        ],
    ),
    "explained-variance": Chart(
        "Explained variance",
        "How much of the returns the value head predicts: 1 all, 0 as their mean. From −1 on.",
        [Panel("share", "ppo/val/explained_variance", floor=0, bottom=-1)],
    ),
    "losses": Chart(
        "Losses",
        "The policy's loss is near 0 by construction; what counts is its gradient. That of "
        "the values, where there are any, is half the squared error of the value head.",
        [Panel("policy", "ppo/loss/policy"), Panel("value", "ppo/loss/value", floor=0)],
    ),
    "gradient": Chart(
        "Gradient norm",
        "Before clipping, as the mean over the updates of a step.",
        [Panel("norm", "ppo/grad_norm", floor=0)],
    ),
    "learning-rate": Chart(
        "Learning rate",
        "Step size of the optimiser.",
        [Panel("learning rate", "learning_rate", floor=0)],
    ),
    "time": Chart(
        "Time of a step",
        "Seconds of each phase.",
        [Panel(phase, f"time/{phase}", floor=0) for phase in PHASES],
    ),
    "throughput": Chart(
        "Throughput",
        "Tokens through a whole step, in each second.",
        [Panel("tokens per second", "tokens_per_second", floor=0)],
    ),
}
"""The charts by the names of their files, in the order to show them."""
