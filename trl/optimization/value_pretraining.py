"""When the values know enough for the policy to begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

RISE, WINDOW = 0.01, 8
"""The explained variance still rises if its mean over so many steps has gained so much on that of
as many before: one batch alone says little, its figure changes by ten times as much."""


@dataclass
class ValuePretraining:
    """Steps on rollouts of the untuned policy that train its values alone, before its first own.

    They end once the explained variance of the returns, 1 − Var(returns − values) / Var(returns),
    stops rising, and after `most` steps at the latest.
    """

    most: int
    done: int = 0
    explained: list[float] = field(default_factory=list)
    """That of the last 2·WINDOW steps, before their updates."""

    @property
    def over(self) -> bool:
        """Whether the policy may begin."""
        before, after = self.explained[:WINDOW], self.explained[WINDOW:]
        settled = len(after) == WINDOW and mean(after) < mean(before) + RISE
        return settled or self.done >= self.most

    def count(self, explained: float) -> None:
        """Take note of a step, by the explained variance before its updates."""
        self.done += 1
        self.explained = [*self.explained, explained][-2 * WINDOW :]

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the steps that come."""
        return {"done": self.done, "explained": list(self.explained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; older ones have no figures, which then begin anew."""
        self.done, self.explained = int(state["done"]), list(state.get("explained", ()))
