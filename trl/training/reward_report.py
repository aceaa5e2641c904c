"""How far a reward model is to be trusted: measured on preferences it has not seen, and written up.

Accuracy stands beside the simplest rule there is, "the longer text wins": people do like longer
answers, and a model that has learnt no more than that will be gamed by length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trl.config.recipe import RewardRecipe
from trl.data.preferences import Preference, as_read
from trl.evaluation.people.agreement import wilson
from trl.report.charts import Chart, Curve, Panel
from trl.report.drawing import draw

__all__ = ["calibration", "measure", "write_report"]

NEAR = 0.2
"""Texts whose lengths differ by a smaller share than this are of like length."""

Group = dict[str, Any]
"""Preferences of one kind: `name`, `count`, `accuracy` and its `interval`."""


class Judged(NamedTuple):
    """A preference with one response that most people chose, and what was made of it."""

    right: bool
    """Whether the model gives that response the highest reward."""
    by_length: float
    """Whether it is the longest one; shared among texts of the same length."""
    sure: float
    """Probability that the model gives to its choice."""
    gap: float
    """The highest reward less the next."""
    agreement: float
    """Share of the votes, ties among them, for the response that most people chose."""
    margin: float
    """As the row has it."""
    spread: float
    """The longest text less the shortest, as a share of the longest, in characters."""


def measure(
    preferences: Sequence[Preference], rewards: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return how rewards agree with what people preferred.

    Only preferences count of which one response was chosen most often.

    Args:
        preferences: To measure on.
        rewards: Of each response to each, on the scale that was learnt: a softmax over them is the
            probability of each choice.

    Returns:
        `accuracy`, the share of which the model gives that response the highest reward, with its
        95 % `interval`; `length_rule`, the accuracy of "the longer text wins"; `like_length`, the
        accuracy where lengths differ by less than 20 %; `ece`, the expected calibration error, with
        its `bins`; accuracy `by_gap` of the model's rewards, `by_agreement` of the people, and
        `by_margin` of the rows; `longest_chosen` by the model and by people, and the correlation of
        `reward_and_length` within a preference; and how many are `decided` and `tied`.
    """
    judged = [_judged(*each) for each in zip(preferences, rewards, strict=True)]
    decided = [each for each in judged if each is not None]
    bins, error = calibration([each.sure for each in decided], [each.right for each in decided])
    like = [each for each in decided if each.spread < NEAR]
    whole = _group("all", decided)
    return {
        "accuracy": whole["accuracy"],
        "interval": whole["interval"],
        "length_rule": _mean(each.by_length for each in decided),
        "like_length": _group("lengths that differ by < 20 %", like),
        "like_length_rule": _mean(each.by_length for each in like),
        "ece": error,
        "bins": bins,
        "by_gap": _parts(decided, lambda each: each.gap, 5),
        "by_agreement": _parts(decided, lambda each: each.agreement, 4),
        "by_margin": _parts(decided, lambda each: each.margin, 4),
        "length_bias": _length_bias(preferences, rewards, decided),
        "decided": len(decided),
        "tied": len(judged) - len(decided),
    }


def calibration(
    sure: Sequence[float], right: Sequence[bool], bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Return how often a model is right by how sure it is, and the expected calibration error.

        ECE = Σ_bins n_b/n · |accuracy_b − confidence_b|

    (Guo et al., arXiv:1706.04599, equation 3), over bins of equal width from 0 to 1.

    Args:
        sure: Probability of each choice.
        right: Whether it was the right one.
        bins: Their number; of two responses only the upper half can hold any.
    """
    place = [min(int(probability * bins), bins - 1) for probability in sure]
    found = []
    for index in sorted(set(place)):
        rows = [row for row, each in enumerate(place) if each == index]
        figures = {
            "confidence": [sure[row] for row in rows],
            "accuracy": [right[row] for row in rows],
        }
        found.append({"count": len(rows)} | {name: _mean(all_) for name, all_ in figures.items()})
    gaps = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in found]
    return found, sum(gaps) / max(1, len(sure))


def _judged(preference: Preference, rewards: Sequence[float]) -> Judged | None:
    """Return what was made of a preference; None: no response was chosen most often."""
    *choices, _ = preference.votes
    most = max(choices)
    if choices.count(most) > 1:
        return None
    chosen = choices.index(most)
    lengths = _lengths(preference)
    longest = [length == max(lengths) for length in lengths]
    best, *others = sorted(rewards, reverse=True)
    odds = [math.exp(reward - best) for reward in rewards]
    return Judged(
        right=rewards[chosen] == best and rewards.count(best) == 1,
        by_length=longest[chosen] / sum(longest),
        sure=1 / sum(odds),
        gap=best - others[0],
        agreement=most / sum(preference.votes),
        margin=preference.margin,
        spread=1 - min(lengths) / max(1, *lengths),
    )


def _lengths(preference: Preference) -> list[int]:
    """Return the characters of each response."""
    return [len(as_read(preference.prompt, each)[1][1]) for each in preference.responses]


def _length_bias(
    preferences: Sequence[Preference], rewards: Sequence[Sequence[float]], decided: list[Judged]
) -> dict[str, float]:
    """Return how much of it is length; of a preference with texts of unequal length."""
    away: list[tuple[float, float]] = []
    model, people = [], []
    for preference, each in zip(preferences, rewards, strict=True):
        lengths = _lengths(preference)
        if min(lengths) < max(lengths):
            centred = (np.subtract(x, np.mean(x)).tolist() for x in (each, lengths))
            away += zip(*centred, strict=True)
            longest = [index for index, length in enumerate(lengths) if length == max(lengths)]
            model.append(max(each[index] for index in longest) == max(each))
            if votes := sum(preference.votes[:-1]):
                people.append(sum(preference.votes[index] for index in longest) / votes)
    x, y = np.array(away).T if away else (np.zeros(1), np.zeros(1))
    varies = x.std() > 0 and y.std() > 0
    return {
        "longest_chosen_by_model": _mean(model),
        "longest_chosen_by_people": _mean(people),
        "reward_and_length": float(np.corrcoef(x, y)[0, 1]) if varies else 0.0,
        "accuracy_where_longest_won": _mean(e.right for e in decided if e.by_length == 1),
        "accuracy_where_it_lost": _mean(e.right for e in decided if e.by_length == 0),
    }


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean; None of nothing, which JSON can say."""
    values = list(values)
    return sum(values) / len(values) if values else None


def _group(name: str, rows: Sequence[Judged]) -> Group:
    right = sum(each.right for each in rows)
    accuracy, interval = _mean(each.right for each in rows), list(wilson(right, len(rows)))
    return {"name": name, "count": len(rows), "accuracy": accuracy, "interval": interval}


def _parts(rows: Sequence[Judged], value: Callable[[Judged], float], most: int) -> list[Group]:
    """Return groups by a value, of about the same size; none if it is constant."""
    values = [value(each) for each in rows]
    if len(set(values)) < 2:
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, most + 1)[1:-1]))
    place = np.searchsorted(edges, values, side="right")
    found = []
    for index in sorted(set(place.tolist())):
        inside = [each for each, where in zip(rows, place, strict=True) if where == index]
        ends = sorted({f"{end(map(value, inside)):.3g}" for end in (min, max)}, key=float)
        found.append(_group(" to ".join(ends), inside))
    return found


# -- the page --------------------------------------------------------------------------------------


def write_report(folder: Path, recipe: RewardRecipe, figures: dict[str, Any]) -> Path:
    """Write report.md, and its pictures beside it, and return its path.

    Args:
        folder: Of the run.
        recipe: Its settings.
        figures: What stands in summary.json.
    """
    bias, like = figures["length_bias"], figures["like_length"]
    accuracy, rule = figures["accuracy"], figures["length_rule"]
    text = [
        "# Reward model",
        f"`{recipe.model}` on {figures['train_preferences']:,} preferences of `{recipe.train}`, "
        f"measured on {figures['decided']:,} that it has not seen "
        f"({figures['tied']:,} more have no response that most people chose).",
        "## Accuracy",
        _table(
            ["", "accuracy", "95 % interval", "preferences"],
            [
                _row(figures | {"name": "the model", "count": figures["decided"]}),
                ["the longer text wins", _percent(rule), "", f"{figures['decided']:,}"],
                _row(like),
                ["there the longer text wins", _percent(figures["like_length_rule"]), "", ""],
            ],
        ),
    ]
    if accuracy is not None and figures["interval"][0] <= rule:
        text.append("**Not better than length alone, as far as these preferences can tell.**")
    text += [
        "## Calibration",
        "![How often it is right, by how sure it is](report/calibration.png)",
        f"Expected calibration error {_percent(figures['ece'])}: how far off its probabilities are "
        "on average. On the scale that is saved, rewards were divided by "
        f"{figures['std']:.3g}: a softmax of them times that number gives these probabilities.",
    ]
    for name, title in (
        ("by_gap", "By how far apart the two highest rewards are"),
        ("by_agreement", "By the share of people who agree"),
        ("by_margin", "By the margin of the preference"),
    ):
        if figures[name]:
            columns = ["", "accuracy", "95 % interval", "preferences"]
            text += [f"## {title}", _table(columns, map(_row, figures[name]))]
    told = [
        ("the longest response is chosen by the model", bias["longest_chosen_by_model"]),
        ("and by people", bias["longest_chosen_by_people"]),
        ("accuracy where people chose the longest", bias["accuracy_where_longest_won"]),
        ("accuracy where they did not", bias["accuracy_where_it_lost"]),
    ]
    rows = [[name, _percent(share)] for name, share in told]
    rows.append(["correlation of reward and length", f"{bias['reward_and_length']:.2f}"])
    text += ["## Length", _table(["", ""], rows)]
    draw(_calibration_chart(figures["bins"]), folder / "report" / "calibration.png")
    if figures.get("curve"):
        whole = figures | {"preferences": figures["train_preferences"]}
        points = [*figures["curve"], whole]
        draw(_curve_chart(points), folder / "report" / "curve.png")
        rows = [_row(each | {"name": f"{each['preferences']:,}", "count": ""}) for each in points]
        columns = ["preferences", "accuracy", "95 % interval", ""]
        text += ["## By the number of preferences", _table(columns, rows)]
        text.append("![Accuracy by the number of preferences](report/curve.png)")
    if problems := figures.get("problems"):
        text += ["## Left out", "\n".join(f"* {each}" for each in problems[:MOST_TOLD])]
        text.append(f"{len(problems):,} rows could not be used.")
    path = folder / "report.md"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path


MOST_TOLD = 20
"""Rows that cannot be read and are named on the page."""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _row(group: Group) -> list[str]:
    ends = " to ".join(f"{100 * end:.1f}" for end in group["interval"])
    count = group["count"]
    return [group["name"], _percent(group["accuracy"]), f"{ends} %", f"{count:,}" if count else ""]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _calibration_chart(bins: Sequence[dict[str, float]]) -> Chart:
    sure, right = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
    ends = [min(0.5, *sure, *right), 1.0] if bins else [0.5, 1.0]
    curves = [
        Curve("right as often as sure", 0, 1, ends, ends),
        Curve("the model", 0, 0, sure, right, kind="points"),
    ]
    return Chart("Calibration", "", [Panel("share right", curves=curves)], "probability it gives")


def _curve_chart(points: Sequence[dict[str, Any]]) -> Chart:
    x = [float(np.log10(each["preferences"])) for each in points]
    y = [each["accuracy"] for each in points]
    low, high = ([each["interval"][end] for each in points] for end in (0, 1))
    panel = Panel("accuracy", curves=[Curve("accuracy", 0, 0, x, y, low, high)])
    return Chart("More preferences", "", [panel], "log10 of the number of preferences")
