"""Names and forms of the held-out figures, what of runs is compared, tables for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trl.config.errors import hidden
from trl.config.recipe import RewardConfig
from trl.config.writing import as_mapping, flatten
from trl.report.run import Run, Sample, read_runs
from trl.watch.markdown import visible

NAMES = {
    "reward/mean": "mean reward",
    "reward/median": "median reward",
    "reward/std": "standard deviation of the reward",
    "accuracy": "accuracy",
    "kl": "KL to the reference, nats per response",
    "distinct_2": "distinct-2",
    "length": "response length, tokens",
    "ended": "share that ended by themselves",
    "episode/turns": "turns",
    "episode/tool_calls": "tool calls",
    "episode/tool_errors": "tool calls that failed",
}
UNSIGNED = ("reward/std", "_probability")
MORE_IS_BETTER = ("reward/mean", "reward/median", "accuracy")
NOT_A_SETTING = ("out", "tracking.name", "profile", "quiet")
"""Settings that say where a run writes, not what it does."""
SAMPLES = 8
"""Samples in the terminal."""

Row = tuple[str, list[str], set[int]]
"""A name, a text for each run, and the runs that are best."""


def figure_name(key: str) -> str:
    """What a held-out figure is called in a table."""
    return NAMES.get(key, key.replace("reward/", "reward: ").replace("stop/", "share stopped by: "))


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
    unused = [key for key in there if key.startswith(("stop/", "episode/tool"))]
    for key in unused:  # a game has no tools, and most limits are never met
        if not any(side.get(key) for side in sides):
            del there[key]
    return [key for key in NAMES if key in there] + [key for key in there if key not in NAMES]


def shown(
    key: str, value: float | None, *, change: bool = False, among: Iterable[float | None] = ()
) -> str:
    """A held-out figure as text, with a minus sign and with + where it may be negative.

    Two decimals, one for the KL and lengths; `among` are the values beside it, which decide
    whether all are too small or too large for that.
    """
    if value is None or not math.isfinite(value):
        return "–"
    is_reward, decimals = key.startswith("reward/"), 1 if key in ("kl", "length") else 2
    sign = "+" if change or (is_reward and not key.endswith(UNSIGNED)) else ""
    size = max(abs(x) for x in (value, *among) if x is not None and math.isfinite(x))
    if size >= 1e6 or (is_reward and 0 < size < 0.5 * 10**-decimals):
        return f"{value:{sign}.2g}".replace("-", "−")
    return signed(value, sign, decimals)


def signed(value: float, sign: str, decimals: int) -> str:
    """A number with its sign, or + too; what rounds to 0 has none."""
    rounded = round(value, decimals)
    return f"{rounded + 0.0:{sign if rounded else ''},.{decimals}f}".replace("-", "−")


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
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), hidden(str(value)))


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
    inner = {key.rpartition(".")[0] for key, _, _ in rows}  # a section that only some runs have
    return [
        (key, values)
        for key, values, differ in rows
        if differ and key not in (*NOT_A_SETTING, *inner) and not _is_unsaid(key, values)
    ]


def _is_unsaid(key: str, values: Sequence[str]) -> bool:
    """Whether some runs have no such scorer, and the others leave this of it as it is."""
    section, _, name = key.rpartition(".")
    default = flatten(as_mapping(RewardConfig())).get(name, "–")
    named = name in ("kind", "name")  # what the scorer is
    is_scorer = section.rpartition(".")[0] == "reward" and not named
    return is_scorer and "–" in values and {*values} <= {"–", setting(default)}


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


def reward_change(run: Run) -> tuple[list[float], float] | None:
    """By how much the reward of each held-out prompt has changed, and 1.96 standard errors of that.

    None for less than eight prompts.
    """
    rewards = [(before.reward, after.reward) for before, after in run.pairs]
    changes = [after - before for before, after in rewards if None not in (before, after)]
    if len(changes) < 8:
        return None
    return changes, 1.96 * statistics.stdev(changes) / math.sqrt(len(changes))


def with_ends(changes: Sequence[float], margin: float) -> list[str]:
    """The mean of changes of the reward, and the ends of its interval, as texts."""
    mean = statistics.fmean(changes)
    values = (mean, mean - margin, mean + margin)
    return [shown("reward/mean", value, among=values) for value in values]


def verdict(run: Run) -> str:
    """The run in one line: held-out reward changed by +0.48 [0.38, 0.58], KL 5.8 nats, 2 warnings.

    Without an interval: held-out reward changed by +0.25 (from 0.25 to 0.50, 6 prompts), …
    """
    key, found = "reward/mean", reward_change(run)
    told = "nothing measured on held-out prompts" + (" since the start" if run.before else "")
    if found:
        told = "held-out reward changed by {} [{}, {}]".format(*with_ends(*found))
    elif key in run.after and key in run.before:
        change = run.after[key] - run.before[key]
        ends = (shown(key, each[key]).lstrip("+") for each in (run.before, run.after))
        count = len(run.pairs)
        few = f", {count} prompt{'' if count == 1 else 's'}" if count else ""
        told = f"held-out reward changed by {shown(key, change)} (from {' to '.join(ends)}{few})"
    best, at = peak(run)
    if best is not None and best > run.after.get(key, math.inf):
        told += f" (its best was {shown(key, best)}, at step {at})"
    kl = [f"KL {shown('kl', run.after['kl'])} nats"] if "kl" in run.after else []
    count = len(run.warnings)
    warnings = f"{count or 'no'} warning{'' if count == 1 else 's'}"
    return ", ".join([told, *kl, warnings])


def peak(run: Run) -> tuple[float | None, int]:
    """The best mean reward on held-out prompts, and the first step that had it; None: none is."""
    key = "reward/mean"
    means = [(figures[key], -step) for step, figures in run.evaluations if key in figures]
    best, at = max(means, default=(None, 0))
    return best, -at


# --- in the terminal -----------------------------------------------------------------------------


def _text(text: str, style: str = "") -> Text:
    """Return a text of unknown origin as the terminal may show it."""
    return Text(visible(text), style=style)


def _said(sample: Sample) -> str:
    """A response; of an episode of several turns also what the policy was told in between."""
    if len(sample.turns) < 2:
        return sample.response
    return " ".join(
        turn.content if turn.role == "assistant" else f"[{turn.role}] {turn.content}"
        for turn in sample.turns
    )


def before_after_tables(run: Run) -> list[Table]:
    """Samples and figures on the held-out prompts before and after; none without evaluations."""
    if not run.pairs:
        return []
    samples = Table(title="Samples", title_justify="left", show_lines=True)
    samples.add_column("prompt", ratio=2)
    for side in ("before", "after"):
        samples.add_column(side, ratio=3)
        samples.add_column("reward", justify="right")
    for before, after in run.pairs[:SAMPLES]:
        cells = [_text(" ".join(before.prompt.split()))]
        for sample in (before, after):
            style = "green" if (sample.reward or 0) > 0 else "red"
            cells.append(_text(" ".join(_said(sample).split())))
            cells.append(_text(shown("reward/mean", sample.reward), style=style))
        samples.add_row(*cells)
    figures = Table("", title="Held-out prompts", title_justify="left")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right", style="bold")
    for key in figure_keys([run]):
        sides = [side.get(key) for side in (run.before, run.after)]
        figures.add_row(_text(figure_name(key)), *(shown(key, x, among=sides) for x in sides))
    return [samples, figures]


def compare(runs: Sequence[Path | str]) -> Table:
    """The held-out figures of runs at their last evaluation, and the settings that differ.

    Args:
        runs: Folders of runs; each becomes a column.

    Returns:
        A table for the terminal. The best mean reward is bold and green, unless the runs were
        scored by different rewards.
    """
    read = read_runs(runs)
    table = Table("", title="Held-out prompts, last evaluation", title_justify="left")
    for run in read:
        table.add_column(_text(run.name), justify="right", overflow="fold")
    for section in _sections(read):
        for name, texts, best in section:
            styles = ["bold green" if number in best else "" for number in range(len(texts))]
            table.add_row(_text(name), *map(_text, texts, styles))
        table.add_section()
    return table


def _sections(runs: Sequence[Run]) -> list[list[Row]]:
    verdicts: list[Row] = [("verdict", [verdict(run) for run in runs], set())]
    figures: list[Row] = []
    for key in figure_keys(runs):
        values = [(run.after or run.before).get(key) for run in runs]
        texts = [shown(key, value, among=values) for value in values]
        figures.append((figure_name(key), texts, best_of(key, runs, values)))
    key, peaks = "reward/mean", [peak(run) for run in runs]
    if any(mean is not None for mean, _ in peaks):
        texts = [
            f"{shown(key, mean)} (step {at})" if mean is not None else "–" for mean, at in peaks
        ]
        figures.append(("best mean reward", texts, best_of(key, runs, [mean for mean, _ in peaks])))
    about = {
        "progress": [run.state for run in runs],
        "time": [duration(run.seconds) if run.seconds else "–" for run in runs],
        "warnings": [str(len(run.warnings)) for run in runs],
        "algorithm": [run.algorithm or "–" for run in runs],
        "model": [run.model or "–" for run in runs],
    }
    told = ("ppo.algorithm", "model.name")
    differ = {key: values for key, values in settings_that_differ(runs) if key not in told}
    others: list[list[Row]] = [[(name, of[name], set()) for name in of] for of in (differ, about)]
    return [verdicts, others[0], figures, others[1]]
