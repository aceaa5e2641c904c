"""How strongly the policy is held to its reference: the coefficient β of the KL penalty.

Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593), section
2.2. The KL is summed over the tokens of a response and averaged over the responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trl.config.errors import refuse

# Ziegler et al. change β as if the KL missed its target by at most 20 %.
ERROR_LIMIT = 0.2


def update_by_episodes(
    kl_coef: float, current: float, target: float, *, n_steps: int, horizon: float
) -> float:
    """The rule of the paper's code, which moves with the number of responses seen.

        e = clip(KL / target − 1, −0.2, 0.2)        β ← β · (1 + e · n_steps / horizon)

    Args:
        kl_coef: β before.
        current: measured KL, in nats per response.
        target: the KL to reach, in nats per response.
        n_steps: responses in this update (the batch size).
        horizon: responses after which β has moved by about e.
    """
    error = max(-ERROR_LIMIT, min(ERROR_LIMIT, current / target - 1))
    return kl_coef * (1 + error * n_steps / horizon)


class FixedKLController:
    """A constant coefficient, with the methods of `AdaptiveKLController`."""

    def __init__(self, kl_coef: float) -> None:
        self.value = _at_least_0("kl_coef", kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to adapt."""

    def check_steps(self, n_steps: int) -> None:
        """Any number will do."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: if that coefficient is none.
        """
        self.value = _at_least_0("value", state["value"])


class AdaptiveKLController(FixedKLController):
    """A coefficient that follows a target KL, by `update_by_episodes`.

    Args:
        init_kl_coef: β at the start; 0 stays 0.
        target: the KL to reach, in nats per response.
        horizon: in responses; smaller adapts faster.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = _at_least_0("init_kl_coef", init_kl_coef)
        self.target = _above_0("target", target)
        self.horizon = _above_0("horizon", horizon)

    def update(self, current: float, n_steps: int) -> None:
        """Adapt `value` to the KL measured on a batch of `n_steps` responses."""
        if not math.isfinite(current):
            refuse("current", "be a finite KL", float(current), "the policy diverged")
        self.check_steps(n_steps)
        self.value = update_by_episodes(
            self.value, float(current), self.target, n_steps=n_steps, horizon=self.horizon
        )

    def check_steps(self, n_steps: int) -> None:
        """Raise if a batch of `n_steps` responses is too large for the horizon."""
        if _above_0("n_steps", n_steps) * ERROR_LIMIT >= self.horizon:
            rule = f"be < {1 / ERROR_LIMIT:g} horizons, or the coefficient could turn negative"
            got = f"{n_steps} with a horizon of {self.horizon}"
            refuse("n_steps", rule, got, "raise `horizon`")


def _at_least_0(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        refuse(name, "be >= 0 and finite", value)
    return float(value)


def _above_0(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        refuse(name, "be > 0 and finite", value)
    return value
