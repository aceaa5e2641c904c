"""When the values know enough for the policy to begin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RISE, PATIENCE = 0.01, 3
"""The explained variance still rises if it has gained so much within so many steps."""


@dataclass
class ValuePretraining:
    """Steps on rollouts of the untuned policy that train its values alone, before its first own.

    They end once the explained variance of the returns, 1 − Var(returns − values) / Var(returns),
    stops rising, and after `most` steps at the latest.
    """

    most: int
    done: int = 0
    best: float = -math.inf
    stale: int = 0
    """Steps since it rose."""

    @property
    def over(self) -> bool:
        """Whether the policy may begin."""
        return self.done >= self.most or self.stale >= PATIENCE

    def count(self, explained: float) -> None:
        """Take note of a step, by the explained variance before its updates."""
        self.done += 1
        self.stale = 0 if explained > self.best + RISE else self.stale + 1
        self.best = max(self.best, explained)

    def state_dict(self) -> dict[str, float]:
        """Return what decides the steps that come."""
        return {"done": self.done, "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict()`."""
        self.done, self.stale = int(state["done"]), int(state["stale"])
        self.best = float(state["best"])
