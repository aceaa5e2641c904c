"""The figures of a run, and what a symptom is, which is read off them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from trl.config import PPOConfig

KEPT = 40
"""Values of each figure that are kept: the longest window below, and some to spare."""
REWARD_STEPS = 5
"""Batches whose mean reward is compared with the best such mean."""
SURE = 3.0
"""Standard errors by which a mean must lie beyond a bound, so that it is not noise."""
ESSENTIAL = ("reward/mean", "ppo/loss/total", "ppo/grad_norm", "ppo/policy/approxkl")
"""Figures that are never NaN; others may not be measured in some settings."""
RESUMED = ("steps", "first", "last", "best_reward")
"""What a resumed run needs of a history."""


@dataclass
class History:
    """What is known of a run: its settings, and of each figure the first and the last values."""

    config: PPOConfig
    precision: str = "no"
    generation_config: Any = None
    """This and the next two: of the policy, and what writes the responses; known at the start."""
    tokenizer: Any = None
    sampler: Any = None
    steps: int = 0
    first: dict[str, float] = field(default_factory=dict)
    best_reward: float | None = None
    """The highest mean of `REWARD_STEPS` batches, or the first batch."""
    last: dict[str, list[float]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """Figures of the last step that should be numbers and are not."""

    def add(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step."""
        self.steps += 1
        self.broken = []
        for name, value in figures.items():
            if math.isfinite(value):
                self.first.setdefault(name, value)
                self.last[name] = [*self.last.get(name, []), value][-KEPT:]
            elif name in self.first or name in ESSENTIAL:
                self.broken.append(name)
        if "reward/mean" in self.first:
            recent = fmean(self.window(REWARD_STEPS, "reward/mean") or [self.first["reward/mean"]])
            self.best_reward = recent if self.best_reward is None else max(recent, self.best_reward)

    def window(self, count: int, name: str, least: int | None = None) -> list[float]:
        """Return the last values of a figure, none if there are not so many, or not `least`."""
        values = self.last.get(name, [])[-count:]
        return values if len(values) >= (least or count) else []

    def over(self, count: int, name: str, of: Callable[[list[float]], float] = fmean) -> float:
        """Return the mean of the last values, or what else is asked of them.

        NaN, which is beyond no bound, if there are not so many.
        """
        values = self.window(count, name)
        return of(values) if values else math.nan

    def latest(self, name: str) -> float:
        """Return the last value of a figure; 0 if there is none."""
        return self.last.get(name, [0.0])[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the values, copied."""
        return deepcopy({name: getattr(self, name) for name in RESUMED})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name in RESUMED:
            setattr(self, name, deepcopy(state[name]))


Seen = dict[str, Any] | None
"""What the words on a symptom name in braces; None: it is not there."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something that may be wrong with a run."""

    name: str
    check: Callable[[History], Seen]
    seen: str
    """What is seen, in words, with the numbers of the check in braces."""
    causes: tuple[str, ...]
    """Why that usually is, the most frequent cause first."""
    fix: str
    """What to set or to look at."""
    explained_by: tuple[str, ...] = ()
    """Symptoms beside which it says nothing new."""
    at_start: bool = False
    """It is looked for before the first step, and only then."""


def symptom(
    seen: str, *causes: str, fix: str, explained_by: tuple[str, ...] = (), at_start: bool = False
) -> Callable[[Callable[[History], Seen]], Symptom]:
    """Make a symptom of the function that checks for it, and that has its name."""
    return lambda check: Symptom(check.__name__, check, seen, causes, fix, explained_by, at_start)


before_start = partial(symptom, at_start=True)


def is_constant(spread: float, scores: Tensor | float) -> bool:
    """Tell whether scores are equal but for rounding, which is relative to their size."""
    size = float(scores.abs().max()) if isinstance(scores, Tensor) else abs(scores)
    return spread <= 1e-4 * size + 1e-7


def learned(run: History) -> bool:
    """Tell whether the reward of the last batch lies above that of the first, beyond its noise."""
    noise = run.first.get("reward/std", math.inf) / math.sqrt(run.config.batch_size)
    return run.latest("reward/mean") - run.first.get("reward/mean", 0.0) > SURE * noise


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None if one of the two does not change, or is not there."""
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:
        return None
