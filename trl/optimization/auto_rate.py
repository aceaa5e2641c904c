"""A learning rate that sizes itself: each step moves the policy about as far as was asked for.

What a rate does differs a thousandfold between models, adapters, precisions and stages of a run;
how far the policy moves, measured by approxkl, is what PPO can bear. So the distance is set, and
the rate follows, update by update: the adaptive penalty of Schulman et al. (arXiv:1707.06347,
section 4) and the adaptive rates of RL for robots (RSL-RL, rl_games), with the rule solved for the
rate in place of fixed factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl.config import PPOConfig

FIRST = 0.01
"""Share of the initial rate in the very first update: Adam's first moves every weight by the whole
rate, and what that does is not known yet."""
GROW, SHRINK = 3.0, 4.0
"""Most that a rate is multiplied, or divided, by from one update to the next. An adapter begins at
nothing and moves the policy the faster the further it is: growth is not to outrun what is known.
"""
KEEP = 0.5
"""Weight of a measurement beside that of the next one."""
ROUNDING = 0.3
"""Most of the target that can be taken for rounding, where matrix products are in low precision."""
KEEP_ROUNDING = 0.8
"""Weight of a measurement of rounding beside that of the next one."""
LEAST_WAY = 0.1
"""An update goes at least so much of an even share of its step's way."""
TOO_FAR = 2.0
"""Times the way, from where on a step's remaining updates are left out."""


@dataclass
class AutoRate:
    """The rate of the updates of a run.

        d = √max(0, approxkl − rounding)

    is how far the step has moved the policy. d grows with the sum s of the rates that the step has
    applied. Over the measurements so far, each worth `KEEP` times the next,

        c = √(Σ w·(approxkl − rounding) / Σ w·s²)

    is what a rate of 1 would move. Rounding is what approxkl was before the step's first update. In
    low precision every update rounds the activations anew, however small the rate is (2e-4 to 3e-3
    in bf16): there it is where the line approxkl = rounding + slope · s² that fits the measurements
    best, those of small s most (weights 1/s², each `KEEP_ROUNDING` times the next), meets s = 0, up
    to `ROUNDING` of the target. Update i of n (0, 1, …) goes its share of the way that is left,

        rate = max((way − d) / (n − i), LEAST_WAY · way / n) / c        way = factor · √target

    from a `SHRINK`-th of to `GROW` times the last rate, and within the bounds. While nothing has
    moved measurably the rate grows by `GROW`.

    Where all responses that are compared have one score there is nothing to go for: what moves the
    policy then is noise, and a policy that always answers alike hardly moves, until it breaks. Such
    a step does not count as a measurement, and its rate does not grow.

    Args:
        target: approxkl at the end of a step.
        initial: Rate to begin near; any order of magnitude will do.
        lowest: Bound of the rate.
        highest: Likewise.
        low_precision: Whether matrix products are rounded to 16 bits.
    """

    target: float
    initial: float
    lowest: float
    highest: float
    low_precision: bool = False

    @classmethod
    def of(cls, config: PPOConfig, precision: str = "no") -> AutoRate | None:
        """Return the one that settings ask for, at a precision of accelerate's; None: a number."""
        if config.learning_rate != "auto":
            return None
        lowest, highest = config.auto_rate_bounds
        low, first = precision in ("bf16", "fp16"), config.auto_initial_rate
        return cls(config.auto_approxkl, first, lowest, highest, low)

    def __post_init__(self) -> None:
        self.rate = min(max(FIRST * self.initial, self.lowest), self.highest)
        """Of the next update."""
        self.learns = True
        """Whether the scores of the step at hand differ."""
        self._moved = self._spent = 0.0  # Σ w·(approxkl − rounding), Σ w·s²
        self._line = [0.0] * 5  # Σ w/s², Σ w, Σ w·s², Σ w·approxkl/s², Σ w·approxkl
        self.begin(1)

    def begin(self, updates: int, factor: float = 1.0) -> None:
        """Begin a step of at most so many updates; `factor` on the way, that of a schedule."""
        self._updates, self._way = updates, factor * math.sqrt(self.target)
        self._floor: float | None = None
        self._distance = self._sum = 0.0
        self._applied = 0

    def measured(self, approxkl: float) -> float:
        """Set and return the rate of the next update, given approxkl [nats] before it."""
        if self._floor is None:
            self._floor = approxkl
        if self._applied:
            moved = approxkl - max(self._floor, self._rounding(approxkl))
            self._distance = math.sqrt(max(moved, 0.0))
            if self.learns:
                self._moved = KEEP * self._moved + moved
                self._spent = KEEP * self._spent + self._sum**2
        elif self._moved <= 0:
            return self.rate  # the first update of all, or again after one that was left out
        share = (self._way - self._distance) / max(self._updates - self._applied, 1)
        share = max(share, LEAST_WAY * self._way / self._updates)
        most, least = (GROW if self.learns else 1.0) * self.rate, self.rate / SHRINK
        wanted = share * math.sqrt(self._spent / self._moved) if self._moved > 0 else most
        self.rate = min(max(wanted, least, self.lowest), most, self.highest)
        return self.rate

    def _rounding(self, approxkl: float) -> float:
        """Return the part of approxkl that does not depend on the rate, with this measurement."""
        if not self.low_precision:
            return 0.0
        square, seen = self._sum**2, min(approxkl, TOO_FAR**2 * self.target)
        new = (1 / square, 1.0, square, seen / square, seen)
        self._line = [KEEP_ROUNDING * old + term for old, term in zip(self._line, new, strict=True)]
        inverse, one, squares, kl_inverse, kl = self._line
        spread = inverse * squares - one**2  # 0 where all s are the same: then all is movement
        slope = (
            (inverse * kl - one * kl_inverse) / spread if spread > 1e-6 * one**2 else kl / squares
        )
        return min(max((kl_inverse - max(slope, 0.0) * one) / inverse, 0.0), ROUNDING * self.target)

    @property
    def too_far(self) -> bool:
        """Whether what is left of the step's updates is to be left out."""
        return self._distance > TOO_FAR * self._way

    def stats(self) -> dict[str, float]:
        """Return the figures of a step: its target of approxkl, and whether a bound is in force."""
        at_bound = float(self.rate >= self.highest) - float(self.rate <= self.lowest)
        return {"ppo/auto_rate/target": self._way**2, "ppo/auto_rate/at_bound": at_bound}

    def applied(self) -> None:
        """Count an update at the present rate."""
        self._sum += self.rate
        self._applied += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        kept = {"moved": self._moved, "spent": self._spent, "line": list(self._line)}
        return {"rate": self.rate, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.rate, self._line = state["rate"], list(state["line"])
        self._moved, self._spent = state["moved"], state["spent"]
