"""The report of a run, or of several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trl
from trl.report import charts as drawing
from trl.report.figures import (
    best_of,
    duration,
    figure_keys,
    figure_name,
    last_figures,
    rewards_differ,
    settings_side_by_side,
    settings_that_differ,
    shown,
    state,
)
from trl.report.run import Run, Sample, read_runs
from trl.report.svg import inline
from trl.report.words import BEYOND_CHANCE, MovedWord, marked, moved_words

OPEN_SAMPLES = 6
FOLDED_SAMPLES = 26
LONGEST_TEXT = 1_500
"""Characters of a prompt or response that are shown."""
LISTED_WORDS = 12
"""Words listed on each side."""

COLOURS = {
    drawing.INK: "var(--ink)",
    drawing.FAINT: "var(--faint)",
    drawing.GRID: "var(--grid)",
    drawing.PAPER: "var(--card)",
} | {colour: f"var(--s{number})" for number, colour in enumerate(drawing.SERIES)}

BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C, 0x200E, 0x200F}
"""Signs that turn the direction of what follows."""


def write_report(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: Folders of runs. What they lack is left out, and the report says so.
        out: The folder to write report.html into, or the file itself (a name that ends in .html).
            The charts are written beside it as PNGs, in a folder of the same name.

    Returns:
        The HTML file. It holds all it needs, and can be sent as it is.
    """
    read = read_runs(runs)
    out = Path(out)
    page = out if out.suffix == ".html" else out / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = page.with_suffix("")
    html = _environment().get_template("report.html.jinja").render(_content(read, pictures))
    page.write_bytes(html.encode("utf-8"))
    return page


def visible(text: Any) -> Any:
    """A text of unknown origin, fit to be shown: signs that cannot be seen are named.

    Control characters and those that turn the direction of the text become ‹U+202E›, halves of
    surrogate pairs the replacement character. What is no text, or is HTML already, stays.
    """
    if not isinstance(text, str) or hasattr(text, "__html__"):
        return text
    return "".join(_visible_sign(sign) for sign in text)


def _visible_sign(sign: str) -> str:
    category = unicodedata.category(sign)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    if (category == "Cc" and sign not in "\n\t") or ord(sign) in BIDI:
        return f"‹U+{ord(sign):04X}›"
    return sign


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )


def _content(runs: Sequence[Run], pictures: Path) -> dict[str, Any]:
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    charts, missing = drawing.charts_of(runs)
    words = [_words(run) for run in runs]
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "version": trl.__version__,
        "script": script,
        "script_hash": base64.b64encode(digest).decode(),
        "runs": [_about(run, number) for number, run in enumerate(runs)],
        "figures": _figures(runs),
        "paired": [sentence for run in runs if (sentence := _paired(run, len(runs) > 1))],
        "charts": [_chart(chart, runs, pictures) for chart in charts],
        "pictures": pictures.name,
        "missing": missing,
        "words": [
            {"run": run.name, "number": number, **listed}
            for number, (run, listed) in enumerate(zip(runs, words, strict=True))
            if listed["compared"]
        ],
        "samples": _samples(runs, [listed["marks"] for listed in words]),
        "open_samples": OPEN_SAMPLES,
        "differ": settings_that_differ(runs) if len(runs) > 1 else [],
        "settings": settings_side_by_side(runs),
    }


def _about(run: Run, number: int) -> dict[str, Any]:
    seconds = run.seconds
    return {
        "name": run.name,
        "number": number,
        "swatch": _swatch(number),
        "path": str(run.path),
        "finished": run.finished,
        "algorithm": run.algorithm,
        "model": run.model,
        "state": state(run),
        "version": (run.summary.get("versions") or {}).get("trl"),
        "time": None if seconds is None else duration(seconds),
        "time_is_whole": run.finished,
        "warnings": [
            {
                "name": warning.name.replace("_", " "),
                "when": _when(warning.steps),
                "seen": warning.seen,
                "causes": warning.causes,
                "fix": warning.fix,
            }
            for warning in run.warnings
        ],
        "notes": run.notes,
    }


def _when(steps: Sequence[int]) -> str:
    steps = sorted(set(steps))
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} times, steps {steps[0]} to {steps[-1]}"


def _swatch(style: int, kind: str = "line") -> dict[str, Any]:
    dash = drawing.DASHES[style % len(drawing.DASHES)]
    return {
        "colour": f"var(--s{style % len(drawing.SERIES)})",
        "dash": " ".join(f"{1.5 * length:g}" for length in dash) or "none",
        "kind": kind,
    }


# --- held-out figures -----------------------------------------------------------------------------


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    """The table of the held-out figures: a row for each, before → after in each run."""
    rows = []
    for key in figure_keys(runs):
        best = best_of(key, runs, [last_figures(run).get(key) for run in runs])
        cells = []
        for number, run in enumerate(runs):
            before, after = run.before.get(key), run.after.get(key)
            both = before is not None and after is not None
            cells.append(
                {
                    "before": shown(key, before),
                    "after": shown(key, after),
                    "change": shown(key, after - before, change=True) if both else "–",
                    "best": number in best,
                }
            )
        rows.append({"name": figure_name(key), "cells": cells})
    steps = {
        number: (run.evaluations[0][0], run.evaluations[-1][0])
        for number, run in enumerate(runs)
        if run.evaluations
    }
    return {
        "rows": rows,
        "steps": steps,
        "has_after": any(run.after for run in runs),
        "rewards_differ": rewards_differ(runs),
    }


def _paired(run: Run, with_name: bool) -> str | None:
    """How surely the mean reward of the held-out prompts has changed, prompt by prompt."""
    changes = [
        after.reward - before.reward
        for before, after in run.pairs
        if before.reward is not None and after.reward is not None
    ]
    if len(changes) < 8:
        return None
    mean = statistics.fmean(changes)
    margin = 1.96 * statistics.stdev(changes) / math.sqrt(len(changes))
    higher = sum(change > 0 for change in changes)
    beginning = f"{run.name}: prompt" if with_name else "Prompt"
    return (
        f"{beginning} by prompt the reward changed by {shown('reward/mean', mean)} on average "
        f"(95 % interval {shown('reward/mean', mean - margin)} to "
        f"{shown('reward/mean', mean + margin)}); it is higher than before on {higher} of "
        f"{len(changes)} prompts."
    )


# --- charts ---------------------------------------------------------------------------------------


def _chart(chart: drawing.Chart, runs: Sequence[Run], pictures: Path) -> dict[str, Any]:
    names = [run.name for run in runs]
    svg, places = drawing.draw(chart, names, pictures / f"{chart.slug}.png")
    hover = [
        place
        | {
            "step": panel.x_label == "step",
            "curves": [
                {
                    "name": curve.label,
                    "run": curve.run,
                    "colour": curve.style % len(drawing.SERIES),
                    "x": [_short(value) for value in curve.x],
                    "y": [_short(value) for value in curve.y],
                }
                for curve in panel.curves
                if curve.kind in ("line", "points", "area")
            ],
        }
        for place, panel in zip(places, chart.panels, strict=True)
        if panel.x_label != ""
    ]
    label = f"{chart.title}. {chart.note}"
    return {
        "slug": chart.slug,
        "title": chart.title,
        "note": chart.note,
        "svg": inline(svg, prefix=chart.slug, label=label, colours=COLOURS),
        "hover": json.dumps([panel for panel in hover if panel["curves"]], separators=(",", ":")),
        "legend": [
            {"label": curve.label, "swatch": _swatch(curve.style, curve.kind)}
            for curve in chart.legend
        ],
    }


def _short(value: float) -> float | int | None:
    """Four significant digits, enough to be read off; None for NaN."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(value) if value == int(value) and abs(value) < 2**53 else short


# --- words and samples ----------------------------------------------------------------------------


def _words(run: Run) -> dict[str, Any]:
    """The words that moved most, up and down, and those to mark in the samples."""
    pairs = run.pairs
    moved = moved_words(
        (before.response for before, _ in pairs), (after.response for _, after in pairs)
    )
    up = [entry for entry in moved if entry.z > BEYOND_CHANCE][:LISTED_WORDS]
    down = [entry for entry in reversed(moved) if entry.z < -BEYOND_CHANCE][:LISTED_WORDS]
    widest = max((abs(entry.z) for entry in up + down), default=1.0)
    return {
        "compared": len(pairs),
        "marks": {entry.word: entry for entry in up + down},
        "sides": [
            {"title": "more often", "kind": "up", "words": _listed(up, widest)},
            {"title": "less often", "kind": "down", "words": _listed(down, widest)},
        ],
        "chance": BEYOND_CHANCE,
    }


def _listed(entries: Sequence[MovedWord], widest: float) -> list[dict[str, Any]]:
    return [
        {
            "word": entry.word,
            "before": entry.before,
            "after": entry.after,
            "z": f"{entry.z:+.1f}".replace("-", "−"),
            "share": round(100 * abs(entry.z) / widest),
        }
        for entry in entries
    ]


def _samples(runs: Sequence[Run], marks: Sequence[Mapping[str, MovedWord]]) -> list[dict[str, Any]]:
    """Blocks of samples: one for all runs if their prompts are the same, else one for each."""
    most = OPEN_SAMPLES + FOLDED_SAMPLES
    with_samples = [number for number, run in enumerate(runs) if run.samples]
    shown_pairs = {number: _shown_pairs(runs[number])[:most] for number in with_samples}
    prompts = {tuple(before.prompt for before, _ in pairs) for pairs in shown_pairs.values()}
    blocks = []
    if len(with_samples) > 1 and len(prompts) == 1:
        rows = []
        for row in range(len(prompts.pop())):
            first = with_samples[0]
            cells = [_cell("before", shown_pairs[first][row][0], marks[first])]
            cells += [
                _cell(runs[n].name, after, marks[n], n)
                for n in with_samples
                if (after := shown_pairs[n][row][1]) is not None
            ]
            rows.append({"prompt": _cut(shown_pairs[first][row][0].prompt), "cells": cells})
        return [{"run": None, "number": 0, "rows": rows, "before_of": runs[with_samples[0]].name}]
    for number in with_samples:
        steps = sorted(runs[number].samples)
        rows = []
        for before, after in shown_pairs[number]:
            cells = [_cell(_at("before", steps[0]), before, marks[number])]
            if after is not None:
                cells.append(_cell(_at("after", steps[-1]), after, marks[number]))
            rows.append({"prompt": _cut(before.prompt), "cells": cells})
        name = runs[number].name if len(runs) > 1 else None
        blocks.append({"run": name, "number": number, "rows": rows, "before_of": None})
    return blocks


def _at(side: str, step: int) -> str:
    return side if side == "before" and step == 0 else f"{side}, step {step}"


def _shown_pairs(run: Run) -> list[tuple[Sample, Sample | None]]:
    """The first and last responses; the first alone where there was but one evaluation."""
    if run.pairs:
        return list(run.pairs)
    return [(sample, None) for sample in run.samples[min(run.samples)]]


def _cell(
    label: str, sample: Sample, marks: Mapping[str, MovedWord], run: int | None = None
) -> dict[str, Any]:
    text, cut = _cut(sample.response)
    return {
        "label": label,
        "swatch": None if run is None else _swatch(run),
        "pieces": [
            {"text": piece, "kind": None if entry is None else "up" if entry.z > 0 else "down"}
            for piece, entry in marked(text, marks)
        ],
        "cut": cut,
        "reward": None if sample.reward is None else shown("reward/mean", sample.reward),
        "facts": _facts(sample),
    }


def _cut(text: str) -> tuple[str, str | None]:
    """The beginning of a text, and how many characters are left out, if any."""
    left_out = len(text) - LONGEST_TEXT
    return (text, None) if left_out <= 0 else (text[:LONGEST_TEXT], f"{left_out:,}")


def _facts(sample: Sample) -> str:
    facts = [
        f"{name[:40]} {shown('reward/part', value)}"
        for name, value in sample.parts.items()
        if len(sample.parts) > 1
    ]
    if sample.kl is not None:
        facts.append(f"KL {shown('kl', sample.kl)}")
    if sample.length is not None:
        facts.append(f"{sample.length:.0f} tokens")
    if sample.ended:
        facts.append("ended by itself")
    return " · ".join(facts)
