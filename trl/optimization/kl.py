"""How strongly the policy is held to its reference: the coefficient β of the KL penalty.

Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593), section
2.2. The KL is summed over the tokens of a response and averaged over the responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Ziegler et al. change β as if the KL missed its target by at most 20 %.
ERROR_LIMIT = 0.2


def proportional_error(current: float, target: float) -> float:
    """How far the KL is from its target: e = clip(KL / target − 1, −0.2, 0.2)."""
    return max(-ERROR_LIMIT, min(ERROR_LIMIT, current / target - 1))


def update_by_episodes(
    kl_coef: float, current: float, target: float, *, n_steps: int, horizon: float
) -> float:
    """The rule of the paper's code, which moves with the number of responses seen.

        β ← β · (1 + e · n_steps / horizon)

    Args:
        kl_coef: β before.
        current: measured KL, in nats per response.
        target: the KL to reach, in nats per response.
        n_steps: responses in this update (the batch size).
        horizon: responses after which β has moved by about e.
    """
    return kl_coef * (1 + proportional_error(current, target) * n_steps / horizon)


def update_by_gain(kl_coef: float, current: float, target: float, *, gain: float = 0.1) -> float:
    """The rule of the paper's text, the same for every batch size: β ← β · (1 + gain · e)."""
    return kl_coef * (1 + gain * proportional_error(current, target))


class AdaptiveKLController:
    """A coefficient that follows a target KL, by `update_by_episodes`.

    Args:
        init_kl_coef: β at the start; 0 stays 0.
        target: the KL to reach, in nats per response.
        horizon: in responses; smaller adapts faster.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        _check_at_least_0("init_kl_coef", init_kl_coef)
        _check_above_0("target", target)
        _check_above_0("horizon", horizon)
        self.value = float(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Adapt `value` to the KL measured on a batch of `n_steps` responses."""
        current = float(current)
        if not math.isfinite(current):
            raise ValueError(f"`current` must be a finite KL, got {current}; the policy diverged.")
        self.check_steps(n_steps)
        self.value = update_by_episodes(
            self.value, current, self.target, n_steps=n_steps, horizon=self.horizon
        )

    def check_steps(self, n_steps: int) -> None:
        """Raise if a batch of `n_steps` responses is too large for the horizon."""
        _check_above_0("n_steps", n_steps)
        if n_steps * ERROR_LIMIT >= self.horizon:
            raise ValueError(
                f"`n_steps` must be < {1 / ERROR_LIMIT:g} horizons, or the coefficient could turn "
                f"negative, got {n_steps} with a horizon of {self.horizon}; raise `horizon`."
            )

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict()`."""
        self.value = float(state["value"])


class FixedKLController:
    """A constant coefficient, with the methods of `AdaptiveKLController`."""

    def __init__(self, kl_coef: float) -> None:
        _check_at_least_0("kl_coef", kl_coef)
        self.value = float(kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to adapt."""

    def check_steps(self, n_steps: int) -> None:
        """Any number will do."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict()`."""
        self.value = float(state["value"])


def _check_at_least_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be >= 0 and finite, got {value}.")


def _check_above_0(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be > 0 and finite, got {value}.")
