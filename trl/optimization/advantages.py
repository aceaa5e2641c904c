"""How much better each token, or each response, did than expected.

Sums over time run over counted tokens only. A token outside the mask, at the end of a row or in
the middle of it (the output of a tool), changes nothing: the counted tokens around it are
neighbours. After the last counted token the value is 0: the episode ends with the response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl.config.errors import refuse
from trl.core import at_least_fp32, check_mask, check_same_shape


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., arXiv:1506.02438, equation 16).

        δ_t = r_t + γ·V_{t+1} − V_t        Â_t = δ_t + γλ·Â_{t+1}        R_t = Â_t + V_t

    Args:
        rewards: [B, R] KL penalties, plus the score at the last response token.
        values: [B, R] values predicted when the response was sampled.
        mask: [B, R] True on response tokens.
        gamma: γ, 0 … 1.
        gae_lambda: λ, 0 … 1; one number, or one per row [B].
    Returns:
        advantages [B, R] (not whitened) and returns [B, R], both 0 outside the mask and without
        gradient.
    """
    check_mask(mask, rewards=rewards, values=values)
    _check_fraction("gamma", gamma)
    _check_fraction("gae_lambda", gae_lambda)
    rewards, values = at_least_fp32(rewards), at_least_fp32(values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(mask.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = next_advantage
    returns = advantages + values
    return torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ of each response by its length (VAPO, Yue et al., arXiv:2504.05118: α = 0.05).

        λ(l) = 1 − 1/max(α·l, 1)

    The weights (γλ)^n of a response's δ then add up to about α·l: λ reaches over the same share of
    a response, however long that is.

    Args:
        lengths: [B] counted tokens of each response.
        alpha: α, > 0.
    Returns:
        [B], 0 … 1.
    """
    if not alpha > 0:
        refuse("alpha", "be > 0", alpha)
    return 1 - 1 / (alpha * lengths).clamp(min=1)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return without a critic (REINFORCE, REINFORCE++ arXiv:2501.03262): G_t = r_t + γ·G_{t+1}.

    REINFORCE++ then whitens the result over the whole batch (`trl.core.masked_whiten`).

    Args:
        rewards: [B, R] KL penalties, plus the score at the last response token.
        mask: [B, R] True on response tokens.
        gamma: γ, 0 … 1.
    Returns:
        [B, R], 0 outside the mask and without gradient.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)[0]


def leave_one_out(scores: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO (Ahmadian et al., arXiv:2402.14740): the baseline is the mean of the other samples.

        A_i = s_i − Σ_{j≠i} s_j / (G − 1)

    A group of equal scores gives exactly 0: Adam would make full steps of what rounding leaves.

    Args:
        scores: [B] per response, with the KL penalty already in it.
        group_ids: [B] equal for samples of one query, in any order; groups may differ in size.
    Returns:
        [B]
    """
    scores = at_least_fp32(scores)
    check_same_shape(scores=scores, group_ids=group_ids)
    group, size = numbered(group_ids)
    others = _group_sum(scores, group)[group] - scores
    return _unless_equal(scores - others / (size[group] - 1), scores, group)


def group_normalize(
    scores: Tensor, group_ids: Tensor, *, scale: bool = True, eps: float = 1e-6
) -> Tensor:
    """GRPO (Shao et al., arXiv:2402.03300): the score relative to its group.

        A_i = (s_i − μ_g) / (σ_g + eps)

    Dr. GRPO (arXiv:2503.20783) leaves the division out: `scale=False`. σ is unbiased; the paper
    does not say which it means. A group of equal scores gives exactly 0: what rounding leaves of
    s − μ may be as large as σ + eps.

    Args:
        scores: [B] per response.
        group_ids: [B] equal for samples of one query, in any order; groups may differ in size.
        scale: divide by the standard deviation of the group.
        eps: bounds what a group of nearly equal scores is multiplied by.
    Returns:
        [B]
    """
    scores = at_least_fp32(scores)
    check_same_shape(scores=scores, group_ids=group_ids)
    group, size = numbered(group_ids)
    centered = scores - (_group_sum(scores, group) / size)[group]
    centered = _unless_equal(centered, scores, group)
    if not scale:
        return centered
    std = (_group_sum(centered.square(), group) / (size - 1)).sqrt()
    return centered / (std[group] + eps)


def numbered(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups 0 … N−1: the group of each row [B] and the size of each group [N].

    Raises:
        ValueError: for a group of one, which has nothing to be compared with.
    """
    if group_ids.dim() != 1:
        refuse("group_ids", "be [B], one entry per response", list(group_ids.shape))
    names, group, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        got = f"1 in group(s) {names[size < 2].tolist()[:8]}"
        fix = "sample each query more than once, as Sampler(group_size=4) does"
        refuse("group_ids", "have at least 2 responses in each group", got, fix)
    return group, size


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Sum per group: [B] to [N]."""
    return x.new_zeros(int(group.max()) + 1 if group.numel() else 0).index_add(0, group, x)


def _unless_equal(advantages: Tensor, scores: Tensor, group: Tensor) -> Tensor:
    """Return the advantages [B], with exactly 0 for groups whose scores are all equal."""
    first = scores.new_empty(int(group.max()) + 1 if group.numel() else 0)
    first[group] = scores  # of each group any one
    differs = torch.zeros_like(first).index_add(0, group, (scores != first[group]).to(first.dtype))
    return torch.where(differs[group] > 0, advantages, 0.0)


def _check_fraction(name: str, value: float | Tensor) -> None:
    lowest, highest = torch.aminmax(value) if isinstance(value, Tensor) else (value, value)
    if not (lowest >= 0 and highest <= 1):
        refuse(name, "be in 0 … 1", value)
