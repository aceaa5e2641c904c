"""Draws a chart with matplotlib: as SVG in the page's own colours, and as a PNG with its title.

A line style goes with each colour, for eyes and printers that do not see the colours.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from trl.report.charts import Chart, Curve, Panel

INK, FAINT, GRID, PAPER = "#2b2f36", "#6b7280", "#e3e6ea", "#fffffe"
SERIES = ("#0b6bb8", "#d9560b", "#00906b", "#a8519a", "#b98300", "#3a9fd8")
"""Colours on white after Okabe and Ito, which the colour-blind tell apart."""
DASHES = [(), (5.0, 2.0), (1.2, 1.8), (6.0, 2.0, 1.2, 2.0), (3.0, 1.5, 1.2, 1.5, 1.2, 1.5)]
"""Line styles; their number and that of the colours share no factor, so 30 runs differ."""
PAGE_COLOURS = {INK: "--ink", FAINT: "--faint", GRID: "--grid", PAPER: "--card"} | {
    colour: f"--s{number}" for number, colour in enumerate(SERIES)
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.formatter.limits": (-4, 5),
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 4.4, 0.66, 0.1, 0.2, 0.42
"""Inches: of a chart, and of its edges, which all charts have alike."""


def draw(chart: Chart, png: Path) -> tuple[str, list[dict[str, Any]]]:
    """Draw a chart, and save it as a PNG with title and legend.

    Args:
        chart: What to draw.
        png: File to write.

    Returns:
        The chart as an SVG element for a page, and for each panel where its axes are: `x` and `y`,
        each as [pixel at one end, pixel at the other end, value at the one, value at the other].
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import Bbox

    # The salt makes the ids in the SVG other ones in each chart.
    with (
        matplotlib.rc_context(STYLE | {"svg.hashsalt": png.stem}),
        warnings.catch_warnings(action="ignore"),  # signs that the font lacks, too large numbers
    ):
        height = max(2.1, 0.8 * len(chart.panels)) + TOP + BOTTOM
        figure = Figure((WIDTH, height), dpi=200)
        figure.subplots_adjust(
            LEFT / WIDTH, BOTTOM / height, 1 - RIGHT / WIDTH, 1 - TOP / height, hspace=0.2
        )
        all_axes = figure.subplots(len(chart.panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, chart.panels, strict=True):
            _draw_panel(axes, panel)
            ticks = 6 if len(all_axes) == 1 else 4
            axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        if chart.x_label == "step":  # whole ones; all panels have the same axis
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel(chart.x_label)
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        places = [_place(axes, 72 * WIDTH, 72 * height) for axes in all_axes]
        handles = {
            label: handle
            for axes in all_axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        place: Any = {"loc": "upper left", "bbox_to_anchor": (0, 0)}
        figure.legend([*handles.values()], [*handles], ncols=3, **place)
        rows = math.ceil(len(handles) / 3)
        figure.suptitle(chart.title, x=0.03, y=1, ha="left", va="bottom")
        png.parent.mkdir(parents=True, exist_ok=True)
        whole = Bbox([[0, -0.1 - 0.2 * rows], [WIDTH, height + 0.25]])
        figure.savefig(png, facecolor="white", bbox_inches=whole)
    return _inline(svg.getvalue(), f"{chart.title}. {chart.note}"), places


def swatch(style: int, kind: str = "line") -> dict[str, str]:
    """How the curves of a style and kind look in a legend on the page."""
    dash = " ".join(f"{1.5 * length:g}" for length in DASHES[style % len(DASHES)]) or "none"
    return {"colour": f"var(--s{style % len(SERIES)})", "dash": dash, "kind": kind}


def _place(axes: Any, width: float, height: float) -> dict[str, list[float]]:
    box = axes.get_position()
    return {
        "x": [box.x0 * width, box.x1 * width, *axes.get_xlim()],
        "y": [(1 - box.y0) * height, (1 - box.y1) * height, *axes.get_ylim()],
    }


def _draw_panel(axes: Any, panel: Panel) -> None:
    for curve in panel.curves:
        _draw_curve(axes, curve)
    low, high = axes.get_ylim()
    if panel.floor is not None and panel.floor <= axes.dataLim.y0:
        low = panel.floor
    if panel.bottom is not None:
        low, high = max(low, panel.bottom), max(high, panel.bottom + 0.1)
    axes.set_ylim(low, high + 0.03 * (high - low))
    axes.set_ylabel(_legend_name(panel.unit))
    axes.yaxis.set_label_coords(-0.5 / (WIDTH - LEFT - RIGHT), 0.5)


def _draw_curve(axes: Any, curve: Curve) -> None:
    colour, dash = SERIES[curve.style % len(SERIES)], DASHES[curve.style % len(DASHES)]
    points, alone = curve.kind == "points", _alone(curve.y)
    drawn = axes.plot(
        curve.x,
        curve.y,
        label=_legend_name(curve.label),
        color=colour,
        linestyle=(0, dash) if dash else "solid",
        linewidth=0.9 if points else 1.5,
        drawstyle="steps-post" if curve.kind == "stairs" else "default",
        marker="o" if points or alone else "",
        markevery=None if points else alone,
        markersize=5 if points else 3.5,
        markeredgecolor=PAPER if points else colour,
        markeredgewidth=0.8,
        zorder=3 if points else 2,
    )
    if curve.low and curve.high:
        band = (curve.x, curve.low, curve.high)
        drawn.append(axes.fill_between(*band, color=colour, alpha=0.13, linewidth=0))
    for artist in drawn:
        artist.set_gid(f"run{curve.run}")


def _alone(values: Sequence[float]) -> list[int]:
    """Where a finite value has no finite neighbour, so that no line shows it."""
    there = [False, *(math.isfinite(value) for value in values), False]
    return [i for i in range(len(values)) if there[i + 1] and not there[i] and not there[i + 2]]


def _legend_name(text: str) -> str:
    """One short line that matplotlib takes: it leaves out names that begin with an underscore."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= 32 else text[:31] + "…"
    return " " + text if text.startswith("_") else text


def _inline(svg: str, label: str) -> str:
    """Turn an SVG document of matplotlib into an element of an HTML page.

    Its colours become those of the page, its fonts are left to the page, its numbers get short. An
    id `run2` becomes a class, which the page can hide; other ids stay where something refers to
    them. Texts stay as they are, escaped.
    """
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'[("]#([\w.-]+)[)"]', svg))
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' id="(run\d+)"', r' class="\1"', svg)
    svg = re.sub(r' id="([^"]*)"', lambda own: own.group() if own[1] in used else "", svg)
    svg = re.sub(r'(?<= style=")[^"]*', _page_style, svg)
    svg = re.sub(r'(?<= )(?:d|x|y|width|height|transform)="[^"]*"', _short_numbers, svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    content = svg[svg.index(">", svg.index("<svg ")) + 1 :]
    assert box is not None
    return f'<svg {box.group()} role="img" aria-label={quoteattr(label)}>' + re.sub(
        r">\s+<", "><", content.replace("xlink:href", "href")
    )


def _page_style(style: re.Match[str]) -> str:
    text = re.sub(r"font-family: [^;]*;? ?", "", style.group())
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, f"var({name})")
    return text


def _short_numbers(attribute: re.Match[str]) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number.group()):.2f}", attribute.group())
    return " ".join(text.split())
