"""Names and forms of the held-out figures, and what of several runs is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trl.report.run import Run

NAMES = {
    "reward/mean": "mean reward",
    "reward/median": "median reward",
    "reward/std": "standard deviation of the reward",
    "kl": "KL to the reference, nats per response",
    "distinct_2": "distinct-2",
    "length": "response length, tokens",
    "ended": "share that ended by themselves",
}
MORE_IS_BETTER = ("reward/mean", "reward/median")
NOT_A_SETTING = ("out", "tracking.name", "profile", "quiet")
"""Settings that say where a run writes, not what it does."""


def figure_name(key: str) -> str:
    """What a held-out figure is called in a table."""
    return NAMES.get(key, key.replace("reward/", "reward: "))


def figure_keys(runs: Sequence[Run]) -> list[str]:
    """The held-out figures of some runs: known ones first, the others as they come.

    The score by the only scorer is left out where it is the reward.
    """
    sides = [side for run in runs for side in (run.before, run.after)]
    there = dict.fromkeys(key for side in sides for key in side)
    by_scorer = [key for key in there if key.startswith("reward/") and key not in NAMES]
    if len(by_scorer) == 1:
        (key,) = by_scorer
        if all(side.get(key, mean) == mean for side in sides if (mean := side.get("reward/mean"))):
            del there[key]
    return [key for key in NAMES if key in there] + [key for key in there if key not in NAMES]


def shown(key: str, value: float | None, *, change: bool = False) -> str:
    """A held-out figure as text, with a minus sign and with + where it may be negative."""
    if value is None or not math.isfinite(value):
        return "–"
    sign = "+" if change or (key.startswith("reward/") and key != "reward/std") else ""
    decimals = 3 if key.endswith("_probability") else {"kl": 1, "length": 1}.get(key, 2)
    if abs(value) >= 1e6 or 0 < abs(value) < 0.5 * 10**-decimals:
        return f"{value:{sign}.2g}".replace("-", "−")
    return f"{value + 0.0:{sign},.{decimals}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as people say it."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def setting(value: Any) -> str:
    """A setting as text, as it stands in the recipe."""
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def settings_side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Name, value in each run ("–" where it is not set), and whether the runs differ in it."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.recipe):
        values = [setting(run.recipe[key]) if key in run.recipe else "–" for run in runs]
        with_recipe = {value for value, run in zip(values, runs, strict=True) if run.recipe}
        rows.append((key, values, len(with_recipe) > 1))
    return rows


def settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that make one run another than the next; where they write is none of them."""
    rows = settings_side_by_side(runs)
    return [(key, values) for key, values, differ in rows if differ and key not in NOT_A_SETTING]


def rewards_differ(runs: Sequence[Run]) -> bool:
    """Whether the runs, as far as their recipes tell, are scored by different rewards."""
    return any(key.startswith("reward") for key, _ in settings_that_differ(runs))


def best_of(key: str, runs: Sequence[Run], values: Sequence[float | None]) -> set[int]:
    """Which runs have the best value of a figure of which more is better.

    None if all are alike, or if different rewards were measured, which do not compare.
    """
    there = [value for value in values if value is not None]
    if key not in MORE_IS_BETTER or len(set(there)) < 2 or rewards_differ(runs):
        return set()
    return {number for number, value in enumerate(values) if value == max(there)}
