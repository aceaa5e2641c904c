"""Per-token losses, and the ways to average them.

A loss function returns one number per token and reduces nothing. An aggregation then makes one
number of them. Its `count` is what to divide by: leave it out for the count of this tensor, or
give the count of the whole optimiser batch (over all micro-batches and processes), and the losses,
and so the gradients, of micro-batches add up to those of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl.config import PPOConfig
from trl.config.errors import refuse
from trl.core import (
    LOG_RATIO_LIMIT,
    at_least_fp32,
    check_mask,
    check_same_shape,
    masked_var,
)

# --- policy -------------------------------------------------------------------------------------


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log ρ = log π − log π_old, limited to ±20 so that one broken token cannot overflow e^x."""
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    difference = at_least_fp32(logprobs) - at_least_fp32(old_logprobs)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    **clip: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate of PPO, per token, with ρ = exp(log π − log π_old).

    See `clipped_surrogate` for the equation.

    Args:
        logprobs: [B, R] of the policy now, with gradient.
        old_logprobs: [B, R] of the policy that sampled the response.
        advantages: [B, R], without gradient.
        mask: Of no account here.
        **clip: `cliprange`, `cliprange_high` and `dual_clip` of `clipped_surrogate`.
    Returns:
        loss [B, R], ratio ρ [B, R] and clipped [B, R] bool.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    loss, clipped = clipped_surrogate(ratio, advantages, **clip)
    return loss, ratio, clipped


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate objective (Schulman et al., arXiv:1707.06347, equation 7), negated.

        L = max(−Â·ρ, −Â·clip(ρ, 1 − ε_low, 1 + ε_high))
        with dual clip, where Â < 0:  L = min(L, −c·Â)

    ε_high > ε_low is "clip-higher" (DAPO, arXiv:2503.14476: 0.2 and 0.28). The dual clip (Ye et
    al., arXiv:1912.09729: c = 3) bounds the loss of a bad token that became much likelier.

    Args:
        ratio: [B, R] per token, or [B] per response (`sequence_ratio`).
        advantages: the same shape.
        cliprange: ε_low.
        cliprange_high: ε_high; None for ε_low.
        dual_clip: c; None for none.
    Returns:
        loss, and clipped: True where a clip decided the loss, which has no gradient there.
    """
    check_same_shape(ratio=ratio, advantages=advantages)
    low, high = _clip_bounds(cliprange, cliprange_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"`dual_clip` must be > 1 or None, got {dual_clip}.")
    advantages = at_least_fp32(advantages)
    free_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(low, high)
    loss = torch.maximum(free_loss, clipped_loss)
    clipped = clipped_loss > free_loss
    if dual_clip is not None:
        beyond = (advantages < 0) & (loss > -dual_clip * advantages)
        loss = torch.where(beyond, -dual_clip * advantages, loss)
        clipped = clipped | beyond
    return loss, clipped


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """One ratio per response (GSPO, arXiv:2507.18071, equation 7), for `clipped_surrogate`.

        s = exp(mean_t log ρ_t)

    Args:
        logprobs: [B, R] of the policy now, with gradient.
        old_logprobs: [B, R] of the policy that sampled the response.
        mask: [B, R] True on response tokens.
    Returns:
        [B], 1 for a row without tokens.
    """
    check_mask(mask, logprobs=logprobs)
    total = torch.where(mask, log_ratio(logprobs, old_logprobs), 0.0).sum(1)
    return (total / mask.sum(1).clamp(min=1)).exp()


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **clip: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """GSPO in its form for tokens, "GSPO-token" (Zheng et al., arXiv:2507.18071).

        s_t = sg(s)·π/sg(π)        L = max(−Â·s_t, −Â·clip(s_t, 1 − ε_low, 1 + ε_high))

    With one advantage for all tokens of a response and `sequence_mean`, value and gradient are
    those of GSPO itself (equation 5). Its clip ranges are small: 3e-4 and 4e-4 in the paper.

    Args:
        logprobs: [B, R] of the policy now, with gradient.
        old_logprobs: [B, R] of the policy that sampled the response.
        advantages: [B, R], without gradient.
        mask: [B, R] True on response tokens.
        **clip: `cliprange`, `cliprange_high` and `dual_clip` of `clipped_surrogate`.
    Returns:
        loss [B, R], ratio s_t [B, R] and clipped [B, R] bool.
    """
    whole = sequence_ratio(logprobs.detach(), old_logprobs, mask)[:, None]
    ratio = whole * (logprobs - logprobs.detach()).exp()
    loss, clipped = clipped_surrogate(ratio, advantages, **clip)
    return loss, ratio, clipped


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv:2506.13585, equation 4): clip the weight and keep every gradient.

        L = −sg(clip(ρ, 1 − ε_low, 1 + ε_high))·Â·log π

    Args:
        logprobs: [B, R] of the policy now, with gradient.
        old_logprobs: [B, R] of the policy that sampled the response.
        advantages: [B, R], without gradient.
        mask: Of no account here.
        cliprange: ε_low; 1 for no lower bound, as in the paper.
        cliprange_high: ε_high; None for ε_low.
        dual_clip: There is none.
    Returns:
        loss [B, R], ratio ρ [B, R] and clipped [B, R] bool.
    """
    check_same_shape(logprobs=logprobs, advantages=advantages)
    low, high = _clip_bounds(cliprange, cliprange_high)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    weight = ratio.detach().clamp(low, high)
    loss = -weight * at_least_fp32(advantages) * at_least_fp32(logprobs)
    return loss, ratio, weight != ratio.detach()


def positive_weights(
    scores: Tensor,
    mask: Tensor,
    config: PPOConfig,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor | None:
    """Weights of −log π that make good responses likelier (VAPO, Yue et al., arXiv:2504.05118).

        L = −Σ_{i in P} Σ_t log π_it / Σ_{i in P} l_i     P: responses with s_i > positive_above

    A token of these has the weight (tokens of the batch) / (tokens of P), the others 0: with it the
    mean over all tokens of the batch is L, and that over a minibatch is right on average, also
    where it has no good response.

    Args:
        scores: [B] as they were given.
        mask: [B, R] True on response tokens.
        config: Which of them are good, and whether they are imitated at all.
        total: From counts [2] of this process to those of all.
    Returns:
        [B, R], all 0 if no response is good; None if none is to be imitated.
    """
    if not config.in_force("positive_coef"):
        return None
    good = mask & (scores > config.positive_above)[:, None]
    tokens, of_good = total(torch.stack((mask.sum(), good.sum())))
    weight: Tensor = tokens / of_good.clamp(min=1)
    return good * weight


# --- value --------------------------------------------------------------------------------------


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the value, which may gain nothing by moving further than the clip range.

        L = ½·max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²)

    From the code of PPO and of Ziegler et al. (arXiv:1909.08593); in no paper as an equation.

    Args:
        values: [B, R] now, with gradient.
        old_values: [B, R] when the response was sampled.
        returns: [B, R], without gradient.
        cliprange_value: ε; None: L = ½(V − R)², and nothing is clipped.
    Returns:
        loss [B, R] and clipped [B, R] bool: True where the clip decided the loss.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    if cliprange_value is not None and not cliprange_value > 0:
        raise ValueError(f"`cliprange_value` must be > 0 or None, got {cliprange_value}.")
    values, old_values, returns = map(at_least_fp32, (values, old_values, returns))
    free_loss = (values - returns).square()
    if cliprange_value is None:
        return free_loss / 2, torch.zeros_like(free_loss, dtype=torch.bool)
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    clipped_loss = (near - returns).square()
    return torch.maximum(free_loss, clipped_loss) / 2, clipped_loss > free_loss


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns the values predict: 1 − Var(R − V) / Var(R).

    1 is perfect, 0 no better than a constant; 0 by convention if all returns are equal.

    Args:
        values: [B, R].
        returns: [B, R].
        mask: [B, R] True on response tokens.
    Returns:
        [], without gradient.
    """
    values, returns = at_least_fp32(values.detach()), at_least_fp32(returns.detach())
    spread = masked_var(returns, mask)
    explained = 1 - masked_var(returns - values, mask) / spread
    return torch.where(spread > 0, explained, torch.zeros_like(explained))


# --- aggregation --------------------------------------------------------------------------------


def token_mean(x: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Every token weighs the same: Σ m·x / tokens (PPO, DAPO).

    Args:
        x: [B, R] per-token loss.
        mask: [B, R] True on response tokens.
        count: response tokens of the whole batch; None for those of `mask`.
    Returns:
        []
    """
    return _masked_sum(x, mask).sum() / _count(count, mask.sum())


def sequence_mean(x: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Every response weighs the same: mean over rows of the row's token mean (GRPO,
    arXiv:2402.03300, equation 3).

    Args:
        x: [B, R] per-token loss.
        mask: [B, R] True on response tokens.
        count: responses of the whole batch; None for the rows of `mask` that have tokens.
    Returns:
        []
    """
    row_means = _masked_sum(x, mask) / mask.sum(1).clamp(min=1)
    return row_means.sum() / _count(count, mask.any(1).sum())


def sequence_sum(x: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean over rows of the row's token sum: the gradient of the expected return (REINFORCE, RLOO).

    Args:
        x: [B, R] per-token loss.
        mask: [B, R] True on response tokens.
        count: responses of the whole batch; None for the rows of `mask` that have tokens.
    Returns:
        []
    """
    return _masked_sum(x, mask).sum() / _count(count, mask.any(1).sum())


def constant_norm(
    x: Tensor, mask: Tensor, count: float | Tensor | None = None, *, length: float
) -> Tensor:
    """`sequence_sum` over a constant length, so that no length is favoured (Dr. GRPO,
    arXiv:2503.20783).

    Args:
        x: [B, R] per-token loss.
        mask: [B, R] True on response tokens.
        count: responses of the whole batch; None for the rows of `mask` that have tokens.
        length: the constant, e.g. the largest number of new tokens.
    Returns:
        []
    """
    if not length > 0:
        raise ValueError(f"`length` must be > 0, got {length}.")
    return sequence_sum(x, mask, count) / length


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ_t m·x per row: [B, R] to [B]."""
    check_mask(mask, x=x)
    return torch.where(mask, at_least_fp32(x), 0.0).sum(1)


def _count(given: float | Tensor | None, own: Tensor) -> float | Tensor:
    """What to divide by: the given count of the whole batch, or this tensor's own."""
    if given is None and not bool(own > 0):
        fix = "for an empty micro-batch give the `count` of the whole batch"
        refuse("mask", "count at least one token", "none", fix)
    if isinstance(given, int | float) and not given > 0:  # reading a tensor would wait for a GPU
        refuse("count", "be > 0", given)
    return own if given is None else given


def _clip_bounds(cliprange: float, cliprange_high: float | None) -> tuple[float, float]:
    """1 − ε_low and 1 + ε_high."""
    if not 0 < cliprange <= 1:
        refuse("cliprange", "be > 0 and <= 1", cliprange)
    high = cliprange if cliprange_high is None else cliprange_high
    if not high > 0:
        refuse("cliprange_high", "be > 0 or None", high)
    return 1 - cliprange, 1 + high
