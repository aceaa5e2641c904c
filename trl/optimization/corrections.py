"""Corrections for who really sampled: another engine, or the policy some steps ago.

μ is what wrote a token (`behaviour_logprobs`), π_old the policy before its first update of the step
(`old_logprobs`), where PPO's ratio starts, and ρ = π_old/μ. What lies between the two is put right
by a weight on each token's loss (Hilton et al., arXiv:2110.00641, "decoupled" PPO):

    L = w·max(−Â·π/π_old, −Â·clip(π/π_old, 1 − ε_low, 1 + ε_high))

Where μ is π_old, every weight is exactly 1. A weight of 0 leaves a token out of the sum, not of
what the sum is divided by. Each correction takes

    old_logprobs [B, R], behaviour_logprobs [B, R], mask [B, R] True on response tokens,
    advantages [B, R], bounds (low, high)

and returns w [B, R], 0 outside the mask and without gradient, and [B, R] bool, which tokens it has
truncated or left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trl.config import PPOConfig
from trl.config.algorithms import CORRECTIONS as BOUNDS
from trl.config.errors import refuse
from trl.core import LOG_RATIO_LIMIT, check_mask
from trl.optimization.losses import log_ratio, sequence_ratio

Bounds = tuple[float, float]
Corrected = tuple[Tensor, Tensor]

ERROR = "behaviour/token_mult_prob_error"
MOST_WEIGHT = 20.0
"""Of a token whose mask looks one way alone, or at probabilities: C of the code of DPPO's paper."""


def tis(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """Truncated importance sampling by token (Yao et al., "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", 2025: at most 2).

        w_t = clip(ρ_t, low, high)
    """
    return _truncated(_ratio(old_logprobs, behaviour_logprobs, mask), mask, bounds)


def sequence_tis(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """Truncated importance sampling by response (Liu, Li et al., "When Speed Kills Stability",
    2025): unbiased but for the bound, and noisier the longer the response.

        w = clip(Π_t ρ_t, low, high), the same for all tokens
    """
    check_mask(mask, old_logprobs=old_logprobs)
    logs = torch.where(mask, log_ratio(old_logprobs, behaviour_logprobs), 0.0).sum(1, keepdim=True)
    whole = logs.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return _truncated(whole.expand(mask.shape), mask, bounds)


def icepop(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """Masked importance sampling, IcePop (Ling team, arXiv:2510.18855: 0.5 and 5).

        w_t = ρ_t if low <= ρ_t <= high, else 0

    The paper's loss divides by all tokens too.
    """
    ratio = _ratio(old_logprobs, behaviour_logprobs, mask)
    return _kept(ratio, _within(ratio, bounds), mask)


def dppo(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """The total-variation mask of DPPO, in its binary form (Qi et al., arXiv:2602.04879: 0.15).

        w_t = min(ρ_t, 20)·[π_old,t − μ_t <= high]   where Â_t > 0
        w_t = min(ρ_t, 20)·[π_old,t − μ_t >= low]    elsewhere

    A rare token may become many times likelier, a frequent one only little. The paper masks by the
    policy of each update, in place of the clip; here the mask is that of the policy before the
    first one, and the clip bounds what the updates of the step add.
    """
    ratio = _ratio(old_logprobs, behaviour_logprobs, mask).clamp(max=MOST_WEIGHT)
    moved = old_logprobs.exp() - behaviour_logprobs.exp()
    return _kept(ratio, _not_too_far(moved, advantages, bounds), mask)


def clip(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """PPO's own clip, around what sampled (Schulman et al., arXiv:1707.06347, eq. 7 with μ in place
    of π_old: 0.8 and 1.2).

        w_t = min(ρ_t, 20)·[ρ_t <= high]   where Â_t > 0
        w_t = min(ρ_t, 20)·[ρ_t >= low]    elsewhere

    That is the gradient of min(Â·π/μ, Â·clip(π/μ, low, high)) where the policy is π_old. What the
    steps since have moved a token counts, so that old rollouts together push it no further than one
    may: four steps old, they teach about a quarter as fast, and do not run away. Wider bounds are
    faster and less sure.
    """
    ratio = _ratio(old_logprobs, behaviour_logprobs, mask)
    return _kept(ratio.clamp(max=MOST_WEIGHT), _not_too_far(ratio, advantages, bounds), mask)


def geometric(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    bounds: Bounds,
) -> Corrected:
    """Rejection of whole responses by their geometric mean (Liu, Li et al., 2025, part 3), which
    does not grow with the length.

        w = 1 if low <= exp(mean_t log ρ_t) <= high, else 0, for all tokens
    """
    mean = sequence_ratio(old_logprobs, behaviour_logprobs, mask)
    keep = _within(mean, bounds)[:, None].expand(mask.shape)
    return _kept(torch.ones_like(old_logprobs), keep, mask)


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Bounds], Corrected]] = {
    "tis": tis,
    "sequence_tis": sequence_tis,
    "icepop": icepop,
    "dppo": dppo,
    "clip": clip,
    "geometric": geometric,
}
"""What `PPOConfig.correction` may name; their bounds: `trl.config.algorithms.CORRECTIONS`."""


def multiplied_error(old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor) -> Tensor:
    """By what factor the probability of each token differs; its mean is `token_mult_prob_error`
    of NeMo-RL, "Add New Models".

        exp(|log π_old − log μ|)

    Args:
        old_logprobs: [B, R].
        behaviour_logprobs: [B, R].
        mask: [B, R] True on response tokens.
    Returns:
        [B, R], 1 or more on response tokens and 0 elsewhere.
    """
    check_mask(mask, old_logprobs=old_logprobs)
    return torch.where(mask, log_ratio(old_logprobs, behaviour_logprobs).abs().exp(), 0.0)


@torch.no_grad()
def corrected(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    config: PPOConfig,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the weights [B, R] of the correction that is set, None without one, and what the
    statistics say of each token [B, R].
    """
    error = multiplied_error(old_logprobs, behaviour_logprobs, mask)
    columns = {ERROR: error}
    if config.correction is None:
        return None, columns
    bounds = config.correction_bounds or BOUNDS[config.correction]
    correct = CORRECTIONS[config.correction]
    weights, touched = correct(old_logprobs, behaviour_logprobs, mask, advantages, bounds)
    masked = (weights == 0).float()
    columns |= {"behaviour/masked": masked, "behaviour/truncated": touched.float() - masked}
    return weights, columns | {"behaviour/weight": weights}


def check_prob_error(means: Mapping[str, float], config: PPOConfig) -> None:
    """Warn, or raise a RuntimeError, if what wrote a batch is too far from the policy.

    Args:
        means: Of the first minibatch, with the mean of `multiplied_error` if it was looked at.
        config: The limits.
    """
    error = means.get(ERROR, 1.0)
    told = (
        f"the recorded log-probs are not the policy's: probabilities differ by a factor of "
        f"{error:.4g} on average (token_mult_prob_error)"
    )
    if config.prob_error_stop is not None and error > config.prob_error_stop:
        rule = f"be at least {error:.4g}, or None, for this rollout, since {told}"
        fix = (
            "if it is meant to be older, or of another engine, raise it and set a `correction`; "
            "else look for a difference in weights, precision or temperature"
        )
        refuse("prob_error_stop", rule, config.prob_error_stop, fix, error=RuntimeError)
    if config.prob_error_warn is not None and error > config.prob_error_warn:
        warnings.warn(
            f"{told}, more than `prob_error_warn` {config.prob_error_warn}.", stacklevel=4
        )


def _ratio(old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ρ [B, R]."""
    check_mask(mask, old_logprobs=old_logprobs)
    return log_ratio(old_logprobs, behaviour_logprobs).exp()


def _within(ratio: Tensor, bounds: Bounds) -> Tensor:
    return (ratio >= bounds[0]) & (ratio <= bounds[1])


def _not_too_far(moved: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """Where a token has not moved beyond the bound that its advantage pushes it towards."""
    return torch.where(advantages > 0, moved <= bounds[1], moved >= bounds[0])


def _truncated(ratio: Tensor, mask: Tensor, bounds: Bounds) -> Corrected:
    """Weights that are held between the bounds."""
    return torch.where(mask, ratio.clamp(*bounds), 0.0), mask & ~_within(ratio, bounds)


def _kept(weights: Tensor, keep: Tensor, mask: Tensor) -> Corrected:
    """The weights where they are to be kept, 0 elsewhere."""
    return torch.where(mask & keep, weights, 0.0), mask & ~keep
