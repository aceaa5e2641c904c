"""The report of a run, or of several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

import trl
from trl.config.errors import refuse
from trl.config.places import check_plain
from trl.report.charts import Chart, charts_of
from trl.report.drawing import SERIES, draw, swatch
from trl.report.figures import (
    best_of,
    duration,
    figure_keys,
    figure_name,
    reward_change,
    rewards_differ,
    settings_side_by_side,
    settings_that_differ,
    shown,
    verdict,
    with_ends,
)
from trl.report.run import Run, Sample, Turn, read_runs
from trl.report.words import BEYOND_CHANCE, MovedWord, marked, moved_words
from trl.watch.markdown import visible

OPEN_SAMPLES = 6
FOLDED_SAMPLES = 26
LONGEST_TEXT = 1_500
"""Characters of a prompt or response that are shown."""
LONGEST_NOTE = 200
"""Characters of what a scorer noted that are shown."""
MOST_TURNS = 40
"""Messages of an episode that are shown."""
CALL = re.compile(
    r"(<tool_call>.*?(?:</tool_call>|\Z)|\[TOOL_CALLS\].*|<\|python_tag\|>.*)", re.DOTALL
)
"""A tool call among the words of a turn, as the common chat templates write it."""
LISTED_WORDS = 12
"""Words listed on each side."""


def write_report(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: Folders of runs. What they lack is left out, and the report says so.
        out: The folder to write report.html into, or the file itself (a name that ends in .html).
            The charts are written beside it as PNGs, in a folder of the same name.

    Returns:
        The HTML file. It holds all it needs, and can be sent as it is.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    read = read_runs(runs)
    out = Path(out)
    page = out if out.suffix == ".html" else out / "report.html"
    if page.exists() and not page.is_file():  # to write into a pipe might never end
        refuse("out", "be a folder or a file for the report", str(page), "move it away")
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = page.with_suffix("")
    check_plain(page, pictures, *(pictures.iterdir() if pictures.is_dir() else ()))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {"duration": duration, "verdict": verdict}
    environment.filters["swatch"] = lambda run: swatch(run.number)
    environment.filters["with_code"] = with_code
    content = _content(read, pictures)
    html = environment.get_template("report.html.jinja").render(content)
    page.write_bytes(html.encode("utf-8"))
    return page


def _content(runs: Sequence[Run], pictures: Path) -> dict[str, Any]:
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    charts, missing = charts_of(runs)
    words = [_words(run) for run in runs]
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "version": trl.__version__,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "runs": runs,
        "figures": _figures(runs),
        "rewards_differ": rewards_differ(runs),
        "paired": [sentence for run in runs if (sentence := _paired(run, len(runs) > 1))],
        "charts": [_chart(name, chart, runs, pictures) for name, chart in charts.items()],
        "pictures": pictures.name,
        "missing": missing,
        "words": [(run, sides) for run, sides in zip(runs, words, strict=True) if run.pairs],
        "chance": BEYOND_CHANCE,
        "samples": _samples(runs, [{e.word: e for e in up + down} for up, down in words]),
        "open_samples": OPEN_SAMPLES,
        "differ": [(*row, False) for row in settings_that_differ(runs)],
        "settings": settings_side_by_side(runs),
    }


def with_code(text: object) -> Markup:
    """A text as HTML in which what stands between backticks is set as code."""
    parts = enumerate(str(visible(str(text))).split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part for number, part in parts
    )


# --- held-out figures -----------------------------------------------------------------------------


def _figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The table of the held-out figures: a row for each, before → after in each run."""
    rows = []
    for key in figure_keys(runs):
        best = best_of(key, runs, [(run.after or run.before).get(key) for run in runs])
        ends = [(run.before.get(key, math.nan), run.after.get(key, math.nan)) for run in runs]
        as_text = partial(shown, key, among=[value for both in ends for value in both])
        cells = []
        for run, (before, after) in zip(runs, ends, strict=True):
            texts = {"before": as_text(before), "after": as_text(after)}
            texts["change"] = as_text(after - before, change=True)
            cells.append(texts | {"run": run, "best": run.number in best})
        rows.append({"name": figure_name(key), "cells": cells})
    return rows


def _paired(run: Run, with_name: bool) -> str | None:
    """How surely the mean reward of the held-out prompts has changed, prompt by prompt."""
    if (found := reward_change(run)) is None:
        return None
    changes, margin = found
    change, low, high = with_ends(changes, margin)
    return (
        f"{f'{run.name}: prompt' if with_name else 'Prompt'} by prompt the reward changed by "
        f"{change} on average (95 % interval {low} to {high}); it is higher than before on "
        f"{sum(change > 0 for change in changes)} of {len(changes)} prompts."
    )


# --- charts ---------------------------------------------------------------------------------------


def _chart(name: str, chart: Chart, runs: Sequence[Run], pictures: Path) -> dict[str, Any]:
    svg, places = draw(chart, pictures / f"{name}.png")
    hover = []
    for place, panel in zip(places, chart.panels, strict=True):
        curves = [
            {"name": curve.label, "run": curve.run, "colour": curve.style % len(SERIES)}
            | {"x": [*map(_short, curve.x)], "y": [*map(_short, curve.y)]}
            for curve in panel.curves
            if curve.kind != "stairs"
        ]
        if curves:
            hover.append(place | {"step": chart.x_label == "step", "curves": curves})
    names = {run.name for run in runs}
    return {
        "name": name,
        "chart": chart,
        "svg": visible(svg),
        "hover": json.dumps(hover, separators=(",", ":")),
        "legend": [
            (c.label, swatch(c.style, c.kind)) for c in chart.legend if c.label not in names
        ],
    }


def _short(value: float) -> float | int | None:
    """Four significant digits, enough to be read off; None for NaN."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.4g}")


# --- words and samples ----------------------------------------------------------------------------


def _words(run: Run) -> tuple[list[MovedWord], list[MovedWord]]:
    """The words that moved most, up and down."""
    before, after = ([pair[side].response for pair in run.pairs] for side in (0, 1))
    moved = moved_words(before, after)
    up = [entry for entry in moved if entry.z > BEYOND_CHANCE]
    down = [entry for entry in reversed(moved) if entry.z < -BEYOND_CHANCE]
    return up[:LISTED_WORDS], down[:LISTED_WORDS]


def _samples(runs: Sequence[Run], marks: Sequence[Mapping[str, MovedWord]]) -> list[dict[str, Any]]:
    """Blocks of samples: one for all runs if their prompts are the same, else one for each."""
    pairs: dict[int, list[tuple[Sample, Sample | None]]] = {}
    for run in runs:
        if found := run.samples or run.last_rollouts:  # of one evaluation there is a before only
            only = [(sample, None) for sample in found[min(found)]]
            pairs[run.number] = [*(run.pairs or only)][: OPEN_SAMPLES + FOLDED_SAMPLES]
    prompts = {tuple(before.prompt for before, _ in listed) for listed in pairs.values()}
    groups = [list(pairs)] if len(prompts) == 1 else [[number] for number in pairs]
    blocks = []
    for group in groups:
        first, alone = runs[group[0]], len(group) == 1
        rows = []
        for row in zip(*(pairs[number] for number in group), strict=True):
            before = row[0][0]
            step = min(first.samples or first.last_rollouts)
            label = f"before, step {step}" if alone and step else "before"
            label = label if first.samples else f"training, step {step}"
            cells = [_cell(label, before, marks[first.number], weights=first.weights)]
            for number, (_, after) in zip(group, row, strict=True):
                if after is not None:
                    label = f"after, step {max(first.samples)}" if alone else runs[number].name
                    named = None if alone else runs[number]
                    weights = runs[number].weights
                    cells.append(_cell(label, after, marks[number], named, weights=weights))
            messages = before.messages or (("", before.prompt),)
            rows.append(
                {"prompt": [(role, *_cut(text)) for role, text in messages], "cells": cells}
            )
        blocks.append({"first": first, "alone": alone, "rows": rows})
    return blocks


def _cell(
    label: str,
    sample: Sample,
    marks: Mapping[str, MovedWord],
    run: Run | None = None,
    *,
    weights: Mapping[str, float],
) -> dict[str, Any]:
    text, cut = _cut(sample.response)
    several = sample.parts if len(sample.parts) > 1 else {}
    facts = [
        f"{_weighted(name, weights)} {shown(f'reward/{name}', value)}"
        for name, value in several.items()
    ]
    facts += [] if sample.kl is None else [f"KL {shown('kl', sample.kl)}"]
    facts += [] if sample.length is None else [f"{sample.length:.0f} tokens"]
    facts += [f"{name.replace('_', ' ')} {count:.0f}" for name, count in sample.counts.items()]
    facts += [f"stopped by {sample.stop}"] if sample.stop else []
    facts += ["ended by itself"] if sample.ended and not sample.stop else []
    return {
        "turns": _bubbles(sample.turns[:MOST_TURNS], marks),
        "more_turns": len(sample.turns[MOST_TURNS:]),
        "label": label,
        "run": run,
        "pieces": _pieces(text, marks),
        "cut": cut,
        "reward": None if sample.reward is None else shown("reward/mean", sample.reward),
        "notes": [(name[:40], *_cut(text, LONGEST_NOTE)) for name, text in sample.notes.items()],
        "facts": " · ".join(facts),
    }


def _weighted(name: str, weights: Mapping[str, float]) -> str:
    """The name of a part of the reward, with its weight unless that is 1."""
    weight = weights.get(name, 1.0)
    return name[:40] if weight == 1 else f"{weight:g} × {name[:40]}"


def _bubbles(turns: Sequence[Turn], marks: Mapping[str, MovedWord]) -> list[dict[str, Any]]:
    """The bubbles of an episode: what the policy says, its tool calls, and what it is told."""
    bubbles: list[dict[str, Any]] = []
    for turn, following in zip_longest(turns, turns[1:]):
        own, pieces = turn.role == "assistant", [turn.content]
        if own:
            pieces = CALL.split(turn.content)  # every other one is a call
            if len(pieces) == 1 and following is not None and following.role.startswith("tool"):
                pieces = ["", turn.content]
        for number, piece in enumerate(pieces):
            text, cut = _cut(piece.strip())
            kind = "call" if number % 2 else turn.role.partition(" ")[0]
            role = "tool call" if number % 2 else turn.role[:40]
            bubble = {"role": role, "kind": kind, "cut": cut, "reward": None}
            if text or len(pieces) == 1:
                bubbles.append(bubble | {"pieces": _pieces(text, marks if own else {})})
        if turn.reward is not None and bubbles:
            bubbles[-1]["reward"] = shown("reward/mean", turn.reward)
    return bubbles


def _pieces(text: str, marks: Mapping[str, MovedWord]) -> list[tuple[str, str | None]]:
    """A text in pieces, each with whether it is a word that moved up or down."""
    moved = marked(text, marks)
    return [(piece, ("up" if word.z > 0 else "down") if word else None) for piece, word in moved]


def _cut(text: str, longest: int = LONGEST_TEXT) -> tuple[str, str | None]:
    """The beginning of a text, and how many characters are left out, if any."""
    left_out = len(text) - longest
    return text[:longest], f"{left_out:,}" if left_out > 0 else None
