"""The charts of one or several runs: what to draw, then drawn with matplotlib.

A chart stands on the page as SVG in the page's own colours, and beside it as a PNG with its title
and legend. With one run the colours tell curves apart, with several they tell the runs apart; a
line style goes with each, for eyes and printers that do not see the colours.
"""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trl.report.run import PHASES, Run

INK, FAINT, GRID, PAPER = "#2b2f36", "#6b7280", "#e3e6ea", "#fffffe"
SERIES = ("#0b6bb8", "#d9560b", "#00906b", "#a8519a", "#b98300", "#3a9fd8")
"""Colours on white after Okabe and Ito, which the colour-blind tell apart."""
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 2),
    (1.2, 1.8),
    (6, 2, 1.2, 2),
    (3, 1.5, 1.2, 1.5, 1.2, 1.5),
)
"""Line styles; their number and that of the colours share no factor, so 30 runs differ."""

MOST_POINTS = 400
"""A longer curve is drawn as means over blocks of steps."""
MOST_BANDS = 3
"""With more runs than this, bands would hide each other."""
BINS = 24

NOT_SCORERS = {"mean", "std", "median", "min", "max"}


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
    kind: Literal["line", "points", "stairs", "area", "bar"] = "line"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    unit: str
    curves: list[Curve]
    x_label: str = "step"
    floor: float | None = None
    """The axis of y reaches down to this at least."""
    bottom: float | None = None
    """The axis of y reaches down to this at most."""
    height: float = 1.0
    """As compared with the other panels of the chart."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its explanation."""

    slug: str
    title: str
    note: str
    panels: list[Panel]
    legend: list[Curve] = field(default_factory=list)
    """What to tell apart besides the runs."""


@dataclass(frozen=True, slots=True)
class Line:
    """How to find one panel of a chart over the steps in the rows of a run."""

    unit: str
    keys: tuple[str, ...]
    """The first of these that a run has."""
    held_out: str | None = None
    spread: str | None = None
    scale: float = 1.0
    floor: float | None = None
    bottom: float | None = None
    constant: str | None = None
    """What to say in place of a panel in which nothing changes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A chart over the steps."""

    slug: str
    title: str
    note: str
    lines: tuple[Line, ...]


PLANS = {
    plan.slug: plan
    for plan in (
        Plan(
            "reward",
            "Reward",
            "Score of the response, before the KL penalty.",
            (Line("score", ("reward/mean",), "held_out/reward/mean", "reward/std"),),
        ),
        Plan(
            "kl",
            "KL to the reference",
            "How far the policy has moved from where it started. The sum over a response of "
            "log π − log π_ref, on average; it cannot stay below 0 if sampling and scoring agree.",
            (
                Line("nats per response", ("objective/kl",), "held_out/kl", floor=0),
                Line(
                    "coefficient",
                    ("objective/kl_coef",),
                    floor=0,
                    constant="The KL coefficient is {} throughout.",
                ),
            ),
        ),
        Plan(
            "entropy",
            "Entropy of the policy",
            "How undecided the policy is at each token. A fast fall towards 0 means that it writes "
            "the same again and again.",
            (Line("nats per token", ("ppo/policy/entropy",), floor=0),),
        ),
        Plan(
            "length",
            "Response length",
            "Tokens of a response, and the share of responses that ended by themselves.",
            (
                Line("tokens", ("response/length",), "held_out/length", floor=0),
                Line(
                    "ended, %",
                    ("response/ended",),
                    scale=100,
                    floor=0,
                    constant="Ended by themselves: {} % throughout.",
                ),
            ),
        ),
        Plan(
            "diversity",
            "Distinct-2",
            "Different bigrams among all bigrams of the held-out responses together: how little "
            "they repeat each other.",
            (Line("share", (), "held_out/distinct_2"),),
        ),
        Plan(
            "clipfrac",
            "Clip fraction",
            "Share of tokens whose probability moved beyond the clip range within a step, and "
            "approximate KL between the policy before and after the update.",
            (
                Line("clipped, %", ("ppo/policy/clipfrac",), scale=100, floor=0),
                Line("approx. KL, nats", ("ppo/policy/approxkl",), floor=0),
            ),
        ),
        Plan(
            "explained-variance",
            "Explained variance",
            "How much of the returns the value head predicts: 1 is all, 0 no more than their mean "
            "does. Not drawn below −1.",
            (
                Line(
                    "share",
                    ("ppo/val/explained_variance", "ppo/val/var_explained"),
                    floor=0,
                    bottom=-1,
                ),
            ),
        ),
        Plan(
            "losses",
            "Losses",
            "The policy's loss is near 0 by construction; what counts is its gradient. The value "
            "loss is half the squared error of the value head.",
            (Line("policy", ("ppo/loss/policy",)), Line("value", ("ppo/loss/value",), floor=0)),
        ),
        Plan(
            "gradient",
            "Gradient norm",
            "Before clipping, as the mean over the updates of a step.",
            (Line("norm", ("ppo/grad_norm",), floor=0),),
        ),
        Plan(
            "learning-rate",
            "Learning rate",
            "Step size of the optimiser.",
            (Line("learning rate", ("learning_rate",), floor=0),),
        ),
        Plan(
            "throughput",
            "Throughput",
            "Tokens through a whole step, in each second.",
            (Line("tokens per second", ("tokens_per_second",), floor=0),),
        ),
    )
}


def charts_of(runs: Sequence[Run]) -> tuple[list[Chart], list[str]]:
    """Plan the charts of some runs.

    Returns:
        The charts, in the order to show them, and the titles of those with nothing to draw.
    """
    builders = (
        ("Reward", lambda: _over_steps(PLANS["reward"], runs)),
        ("KL to the reference", lambda: _over_steps(PLANS["kl"], runs)),
        ("Reward against KL", lambda: _reward_against_kl(runs)),
        ("Scores of a batch", lambda: _score_histogram(runs)),
        (None, lambda: _by_scorer(runs)),  # one scorer alone has no chart of its own
        *((plan.title, lambda plan=plan: _over_steps(plan, runs)) for plan in _others()),
        ("Time of a step", lambda: _time(runs)),
        ("Throughput", lambda: _over_steps(PLANS["throughput"], runs)),
    )
    charts, missing = [], []
    for title, build in builders:
        chart = build()
        if chart is not None:
            charts.append(chart)
        elif title:
            missing.append(title)
    return charts, missing


def _others() -> Iterator[Plan]:
    yield from (p for s, p in PLANS.items() if s not in ("reward", "kl", "throughput"))


def series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, NaN where it is there and no number; empty if it never is."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not any(math.isfinite(value) for _, value in points):
        return [], []
    return [step for step, _ in points], [value for _, value in points]


def thin(values: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """Means over blocks of equal size, so many that at most `most` remain; NaN is left out."""
    size = math.ceil(len(values) / most) if values else 1
    return [
        statistics.fmean(there) if (there := [v for v in block if math.isfinite(v)]) else math.nan
        for block in (values[start : start + size] for start in range(0, len(values), size))
    ]


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
    low = min(min(group) for group in groups)
    high = max(max(group) for group in groups)
    if (high - low) / bins == 0:  # equal, or nearer than numbers can tell
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins
    edges = [low + number * width for number in range(bins)] + [high]
    shares = []
    for group in groups:
        counts = [0] * bins
        for value in group:
            counts[min(bins - 1, int((value - low) / width))] += 1
        shares.append([count / len(group) for count in counts])
    return edges, shares


def _over_steps(plan: Plan, runs: Sequence[Run]) -> Chart | None:
    panels, said = [], []
    for line in plan.lines:
        curves = [curve for number, run in enumerate(runs) for curve in _curves(line, number, runs)]
        if not curves:
            continue
        values = {value for curve in curves for value in curve.y}
        if line.constant and panels and len(values) == 1:
            said.append(line.constant.format(f"{values.pop():.3g}"))
            continue
        height = 1.0 if not panels or plan.slug == "losses" else 0.55
        panels.append(Panel(line.unit, curves, floor=line.floor, bottom=line.bottom, height=height))
    if not panels:
        return None
    curves = [curve for panel in panels for curve in panel.curves]
    longest = max(len(run.metrics) for run in runs)
    if longest > MOST_POINTS and any(curve.kind == "line" for curve in curves):
        said.append(f"Lines of more than {MOST_POINTS} steps are means over blocks of steps.")
    legend: list[Curve] = []
    if any(curve.kind == "points" for curve in curves) and any(c.kind == "line" for c in curves):
        if len(runs) == 1:
            legend = list({curve.label: curve for curve in curves}.values())
        else:
            said.insert(0, "Lines: training batches; dots: held-out prompts.")
    if any(curve.low for curve in curves):
        said.append("The band is ± 1 standard deviation of the responses.")
    return Chart(plan.slug, plan.title, " ".join([plan.note, *said]), panels, legend)


def _curves(line: Line, number: int, runs: Sequence[Run]) -> Iterator[Curve]:
    rows, alone = runs[number].metrics, len(runs) == 1
    for key in line.keys:
        steps, values = series(rows, key)
        if not steps:
            continue
        values = [value * line.scale for value in values]
        low = high = None
        if line.spread and len(runs) <= MOST_BANDS:
            spreads = [row.get(line.spread, math.nan) for row in rows if key in row]
            if any(math.isfinite(spread) for spread in spreads):
                low = thin([v - s for v, s in zip(values, spreads, strict=True)])
                high = thin([v + s for v, s in zip(values, spreads, strict=True)])
        label = "training batch" if alone else runs[number].name
        yield Curve(label, number, number, thin(steps), thin(values), low, high)
        break
    if line.held_out:
        steps, values = series(rows, line.held_out)
        if steps:
            label = "held-out prompts" if alone else runs[number].name
            yield Curve(
                label, number, 1 if alone else number, thin(steps), thin(values), kind="points"
            )


def _reward_against_kl(runs: Sequence[Run]) -> Chart | None:
    curves = []
    for number, run in enumerate(runs):
        points = [
            (figures["kl"], figures["reward/mean"])
            for _, figures in run.evaluations
            if "kl" in figures and "reward/mean" in figures
        ]
        if len(points) > 1:
            label = "held-out prompts" if len(runs) == 1 else run.name
            kl, reward = ([point[side] for point in points] for side in (0, 1))
            style = 1 if len(runs) == 1 else number
            curves.append(Curve(label, number, style, kl, reward, kind="points"))
    if not curves:
        return None
    return Chart(
        "reward-against-kl",
        "Reward against KL",
        "What reward each evaluation on held-out prompts has bought, and how far the policy moved "
        "for it. Higher at the same KL is better.",
        [Panel("score", curves, x_label="KL, nats per response")],
    )


def _by_scorer(runs: Sequence[Run]) -> Chart | None:
    keys = dict.fromkeys(
        key for run in runs for row in run.metrics for key in row if key.startswith("reward/")
    )
    names = [key.removeprefix("reward/") for key in keys]
    names = [name for name in names if name not in NOT_SCORERS]
    if len(names) < 2:
        return None
    if len(runs) > 1:
        plan = Plan(
            "scorers",
            "Score by scorer",
            "Each scorer's part, before it is weighted.",
            tuple(Line(name, (f"reward/{name}",), f"held_out/reward/{name}") for name in names),
        )
        chart = _over_steps(plan, runs)
        return chart and replace(chart, panels=[replace(p, height=0.7) for p in chart.panels])
    curves = []
    for style, name in enumerate(names):
        steps, values = series(runs[0].metrics, f"reward/{name}")
        if steps:
            curves.append(Curve(name, 0, style, thin(steps), thin(values)))
    if not curves:
        return None
    note = "Each scorer's part of the reward, as the mean of a training batch."
    return Chart("scorers", "Score by scorer", note, [Panel("score", curves)], curves)


def _score_histogram(runs: Sequence[Run]) -> Chart | None:
    with_scores = [(number, run) for number, run in enumerate(runs) if run.scores]
    if not with_scores:
        return None
    chosen = []
    for number, run in with_scores:
        steps = sorted(run.scores)
        chosen.append(
            (number, run, [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})])
        )
    edges, shares = histogram([run.scores[step] for _, run, steps in chosen for step in steps])
    found = iter(shares)
    panels = []
    for number, run, steps in chosen:
        curves = []
        for order, step in enumerate(steps):
            style = 0 if len(steps) == 1 else order
            when = ("first", "middle", "last")[order if len(steps) == 3 else 2 * order]
            label = f"step {step}" if len(runs) == 1 else when
            heights = [100 * share for share in next(found)]
            curves.append(Curve(label, number, style, edges, heights, kind="stairs"))
        unit = "responses, %" if len(runs) == 1 else run.name
        height = 1.0 if len(runs) == 1 else 0.6
        panels.append(Panel(unit, curves, x_label="score", floor=0, height=height))
    note = "How the scores of a training batch spread at the first, the middle and the last step."
    if len(runs) > 1:
        note += " In % of the responses."
    longest = max((panel.curves for panel in panels), key=len)
    return Chart("scores", "Scores of a batch", note, panels, longest)


def _time(runs: Sequence[Run]) -> Chart | None:
    if len(runs) == 1:
        curves = []
        for style, phase in enumerate(PHASES):
            steps, values = series(runs[0].metrics, f"time/{phase}")
            if steps:
                values = [value if math.isfinite(value) else 0.0 for value in values]
                curves.append(Curve(phase, 0, style, thin(steps), thin(values)))
        if not curves:
            return None
        note = "Seconds of each phase."
        if all(curve.x == curves[0].x for curve in curves):
            note = "Seconds of each phase, one on top of the other."
            curves = [replace(curve, kind="area") for curve in curves]
        return Chart("time", "Time of a step", note, [Panel("seconds", curves, floor=0)], curves)
    curves = []
    for number, run in enumerate(runs):
        means = []
        for phase in PHASES:
            _, values = series(run.metrics, f"time/{phase}")
            finite = [value for value in values if math.isfinite(value)]
            means.append(statistics.fmean(finite) if finite else math.nan)
        if any(math.isfinite(mean) for mean in means):
            curves.append(Curve(run.name, number, number, list(range(3)), means, kind="bar"))
    if not curves:
        return None
    panel = Panel("seconds", curves, x_label="", floor=0)
    return Chart("time", "Time of a step", "Mean seconds of each phase.", [panel])


# --- drawing --------------------------------------------------------------------------------------


def draw(chart: Chart, run_names: Sequence[str], png: Path) -> tuple[str, list[dict[str, Any]]]:
    """Draw a chart, and save it as a PNG with title and legend.

    Args:
        chart: What to draw.
        run_names: Of all runs of the report.
        png: File to write.

    Returns:
        The chart as SVG, and for each panel where its axes are: `x` and `y`, each as [pixel at one
        end, pixel at the other end, value at the one, value at the other].
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "trl", "text.parse_math": False}
    with matplotlib.rc_context(settings), _quiet():
        figure = Figure(dpi=200, facecolor="none")
        FigureCanvasAgg(figure)
        all_axes: list[Any] = []
        for panel in chart.panels:
            axes = figure.add_subplot(sharex=all_axes[0] if all_axes else None)
            all_axes.append(axes)
            _draw_panel(axes, panel, last=panel is chart.panels[-1])
        _place(figure, all_axes, chart)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        width, height = (size * 72 for size in figure.get_size_inches())
        places = []
        for axes in all_axes:
            box = axes.get_position()
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            places.append(
                {
                    "x": [box.x0 * width, box.x1 * width, left, right],
                    "y": [(1 - box.y0) * height, (1 - box.y1) * height, bottom, top],
                }
            )
        rows = _add_legend(figure, chart, run_names)
        _place(figure, all_axes, chart, above=0.22, below=0.2 * rows)
        figure.suptitle(chart.title, x=0.03, y=0.985, ha="left", weight="bold", color=INK)
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, format="png", facecolor="white")
    return svg.getvalue(), places


def _place(
    figure: Any, all_axes: Sequence[Any], chart: Chart, above: float = 0.0, below: float = 0.0
) -> None:
    """Set the size of a figure and put its panels below each other; all charts have equal edges.

    Args:
        figure: The figure.
        all_axes: Its axes, from the top.
        chart: What is drawn in them.
        above: Inches left free at the top.
        below: Inches left free at the bottom.
    """
    width, left, right, top, bottom, gap = 4.4, 0.66, 0.1, 0.2, 0.42, 0.16
    heights = [panel.height for panel in chart.panels]
    room = max(2.1, 0.7 * len(heights)) - gap * (len(heights) - 1)
    whole = above + top + room + gap * (len(heights) - 1) + bottom + below
    figure.set_size_inches(width, whole)
    edge = whole - above - top
    for axes, height in zip(all_axes, heights, strict=True):
        tall = room * height / sum(heights)
        box = (left, edge - tall, width - left - right, tall)
        axes.set_position((box[0] / width, box[1] / whole, box[2] / width, box[3] / whole))
        axes.yaxis.set_label_coords(-0.5 / (width - left - right), 0.5)
        edge -= tall + gap


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing of signs that the font lacks or numbers too large to draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _draw_panel(axes: Any, panel: Panel, *, last: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    areas = [curve for curve in panel.curves if curve.kind == "area"]
    if areas:
        axes.stackplot(
            areas[0].x,
            *(curve.y for curve in areas),
            colors=[_colour(curve) for curve in areas],
            edgecolor=PAPER,
            linewidth=0.6,
            alpha=0.75,
        )
    bars = [curve for curve in panel.curves if curve.kind == "bar"]
    for number, curve in enumerate(bars):
        wide = 0.8 / len(bars)
        places = [x - 0.4 + (number + 0.5) * wide for x in curve.x]
        drawn = axes.bar(places, curve.y, width=0.92 * wide, color=_colour(curve))
        for bar in drawn:
            bar.set_gid(f"run{curve.run}.{id(bar)}")
    if bars:
        axes.set_xticks(range(len(PHASES)), PHASES)
    for curve in [] if areas or bars else panel.curves:
        _draw_curve(axes, curve)
    low, high = axes.get_ylim()
    if panel.floor is not None and panel.floor <= _lowest(panel):
        low, high = panel.floor, high + 0.04 * (high - panel.floor)
    if panel.bottom is not None:
        low, high = max(low, panel.bottom), max(high, panel.bottom + 0.1)
    if low < high:
        axes.set_ylim(low, high)
    if panel.x_label == "step" and not bars:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(
        MaxNLocator(6 if panel.height > 0.7 else 3, steps=[1, 2, 2.5, 5, 10])
    )
    axes.ticklabel_format(axis="y", scilimits=(-4, 5))
    if last:
        axes.set_xlabel(panel.x_label, fontsize=9, color=FAINT)
    else:
        axes.tick_params(labelbottom=False)
    axes.set_ylabel(_legend_name(panel.unit), fontsize=9, color=FAINT)
    axes.tick_params(labelsize=8.5, labelcolor=FAINT, length=0)
    axes.yaxis.get_offset_text().set(fontsize=8, color=FAINT)
    axes.grid(color=GRID, linewidth=0.7, axis="y" if bars else "both")
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=GRID, linewidth=1)


def _draw_curve(axes: Any, curve: Curve) -> None:
    colour, dash = _colour(curve), _dash(curve)
    drawn = []
    if curve.kind == "stairs":
        drawn.append(
            axes.stairs(curve.y, curve.x, color=colour, linewidth=1.5, linestyle=dash, fill=False)
        )
    elif curve.kind == "points":
        drawn += axes.plot(
            curve.x,
            curve.y,
            color=colour,
            linestyle=dash,
            linewidth=0.9,
            marker="o",
            markersize=5,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            zorder=3,
        )
    else:
        if curve.low and curve.high:
            band = axes.fill_between(
                curve.x, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0
            )
            drawn.append(band)
        drawn += axes.plot(curve.x, curve.y, color=colour, linestyle=dash, linewidth=1.5)
        alone = _alone(curve.y)
        drawn += axes.plot(
            [curve.x[i] for i in alone],
            [curve.y[i] for i in alone],
            color=colour,
            linestyle="none",
            marker="o",
            markersize=3.5,
        )
    for artist in drawn:
        artist.set_gid(f"run{curve.run}.{id(artist)}")


def _lowest(panel: Panel) -> float:
    drawn = (value for curve in panel.curves for value in [*curve.y, *(curve.low or [])])
    return min((value for value in drawn if math.isfinite(value)), default=0.0)


def _alone(values: Sequence[float]) -> list[int]:
    """Where a finite value has no finite neighbour, so that no line shows it."""
    there = [False, *(math.isfinite(value) for value in values), False]
    return [i for i in range(len(values)) if there[i + 1] and not there[i] and not there[i + 2]]


def _colour(curve: Curve) -> str:
    return SERIES[curve.style % len(SERIES)]


def _dash(curve: Curve) -> Any:
    dash = DASHES[curve.style % len(DASHES)]
    return (0, dash) if dash else "solid"


def _add_legend(figure: Any, chart: Chart, run_names: Sequence[str]) -> int:
    """Add the legend below the axes, and return its number of rows."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = list(chart.legend)
    if not entries and len(run_names) > 1:
        entries = [Curve(name, number, number, [], []) for number, name in enumerate(run_names)]
    if not entries:
        return 0
    handles = [
        Patch(color=_colour(curve), alpha=0.75)
        if curve.kind == "area"
        else Line2D(
            [],
            [],
            color=_colour(curve),
            linestyle=_dash(curve),
            linewidth=1.5,
            marker="o" if curve.kind == "points" else "",
            markersize=5,
        )
        for curve in entries
    ]
    columns = min(3, len(entries))
    figure.legend(
        handles,
        [_legend_name(curve.label) for curve in entries],
        loc="lower left",
        bbox_to_anchor=(0.0, 0.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return math.ceil(len(entries) / columns)


def _legend_name(text: str) -> str:
    """One short line that matplotlib takes: it leaves out names that begin with an underscore."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= 32 else text[:31] + "…"
    return " " + text if text.startswith("_") else text
