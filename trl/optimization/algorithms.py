"""Algorithms as compositions of functions: how one differs from another is data.

    ppo           GAE with a critic, whitened     clipped ratio    token mean       KL in the reward
    vapo          ppo with a λ by the length and one for the values; good responses are imitated
    rloo          leave-one-out in the group      clipped ratio    sequence sum     KL in the reward
    grpo          (s − μ) / σ of the group        clipped ratio    sequence mean    KL in the loss
    dr_grpo       s − μ of the group              clipped ratio    sequence sum     KL in the loss
    reinforce++   return of the token, whitened   clipped ratio    token mean       KL in the reward

The paper of each, its equation, and where we differ from it: docs/papers.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trl.config import PPOConfig
from trl.config.algorithms import FACTS
from trl.core import KLKind
from trl.optimization.advantages import (
    discounted_returns,
    gae,
    group_normalize,
    leave_one_out,
    length_adaptive_lambda,
)
from trl.optimization.losses import (
    cispo_loss,
    clipped_policy_loss,
    constant_norm,
    gspo_loss,
    sequence_mean,
    sequence_sum,
    token_mean,
)


class Advantages(NamedTuple):
    """What an estimator makes of the rewards; both without gradient and 0 outside the mask."""

    advantages: Tensor
    """[B, R], not whitened."""
    returns: Tensor | None
    """[B, R] targets of the values; None: there is no critic to train."""


class Counts(NamedTuple):
    """What a mean over a whole minibatch, of all processes, divides by."""

    tokens: Tensor
    """[] response tokens."""
    responses: Tensor
    """[] responses."""


Estimator = Callable[[Tensor, Tensor, Tensor, Tensor | None, PPOConfig], Advantages]
"""(rewards [B, R], values [B, R], mask [B, R], group_ids [B] or None, config) to advantages. The
rewards are the scores, with the KL penalty where that belongs in the reward."""

PolicyLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(log-probs, old log-probs, advantages, mask; cliprange, cliprange_high, dual_clip) to loss, ratio
and clipped, all [B, R]."""

Aggregate = Callable[[Tensor, Tensor, Counts], Tensor]
"""(x [B, R], mask [B, R], counts) to this pass's share [] of the average over the minibatch."""


# --- estimators ---------------------------------------------------------------------------------


def estimate_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, group_ids: Tensor | None, config: PPOConfig
) -> Advantages:
    """Generalized advantage estimation with the values of the critic: see `gae`.

    λ may depend on the length of a response (`length_adaptive_lambda`), and that of the returns may
    be another (VC-PPO, Yuan et al., arXiv:2503.01491: 1, the values' own errors then stay out of
    what they are trained by).
    """
    actor: float | Tensor = config.gae_lambda
    if (alpha := config.in_force("length_adaptive")) is not None:
        actor = length_adaptive_lambda(mask.sum(1), alpha)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, gae_lambda=actor)
    if (critic := config.in_force("gae_lambda_value")) is not None:
        returns = gae(rewards, values, mask, gamma=config.gamma, gae_lambda=critic)[1]
    return Advantages(advantages, returns)


def estimate_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, group_ids: Tensor | None, config: PPOConfig
) -> Advantages:
    """The discounted sum of the rewards from a token on: see `discounted_returns`."""
    return Advantages(discounted_returns(rewards, mask, gamma=config.gamma), None)


def of_groups(compare: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Return an estimator that compares the responses to one query, without a critic.

    Args:
        compare: From sums of rewards [B] and group_ids [B] to the advantage [B] of each response,
            which all of its tokens get.
    """

    def estimate(
        rewards: Tensor, values: Tensor, mask: Tensor, group_ids: Tensor | None, config: PPOConfig
    ) -> Advantages:
        assert group_ids is not None  # checked with what a step is given
        totals, counts = rewards.masked_fill(~mask, 0.0).sum(1), mask.any(1)
        advantages = torch.zeros_like(totals)
        advantages[counts] = compare(totals[counts], group_ids[counts])
        return Advantages(advantages[:, None] * mask, None)

    return estimate


estimate_leave_one_out = of_groups(leave_one_out)
"""A response's reward less the mean of the others in its group: see `leave_one_out`."""

estimate_group_normalized = of_groups(group_normalize)
"""A response's reward in standard deviations of its group: see `group_normalize`."""

estimate_group_centred = of_groups(partial(group_normalize, scale=False))
"""A response's reward less the mean of its group: see `group_normalize`."""


# --- policy losses and averages, by their names in `PPOConfig` ------------------------------------


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": clipped_policy_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}
"""What `PPOConfig.policy_loss` may name."""

AGGREGATES: dict[str, Aggregate] = {
    "token": lambda x, mask, counts: token_mean(x, mask, counts.tokens),
    "sequence": lambda x, mask, counts: sequence_mean(x, mask, counts.responses),
    "sequence_sum": lambda x, mask, counts: sequence_sum(x, mask, counts.responses),
}
"""What `PPOConfig.aggregate` may name, beside "constant", which has a length."""


def _constant(x: Tensor, mask: Tensor, counts: Counts, *, length: int) -> Tensor:
    return constant_norm(x, mask, counts.responses, length=length)


ESTIMATORS: dict[str, Estimator] = {
    "ppo": estimate_gae,
    "vapo": estimate_gae,
    "rloo": estimate_leave_one_out,
    "grpo": estimate_group_normalized,
    "dr_grpo": estimate_group_centred,
    "reinforce++": estimate_returns,
}
"""What the algorithms make of the rewards; what else is known of them: `trl.config.algorithms`."""


# --- algorithms ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    """A way to learn from scored responses.

    To try another: `trainer.algorithm = dataclasses.replace(trainer.algorithm, estimate=mine)`.
    """

    estimate: Estimator
    """From rewards to advantages."""
    critic: bool = False
    """Whether the estimate needs values; `Advantages.returns` are then what to train them by."""
    groups: bool = False
    """Whether the estimate needs several responses to each query."""
    whiten: bool = False
    """Whether advantages are whitened over the batch of all processes."""
    policy_loss: PolicyLoss = POLICY_LOSSES["clip"]
    """Per-token loss of the policy."""
    aggregate: Aggregate = AGGREGATES["token"]
    """How the losses of tokens are averaged."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty for the KL to the reference stands."""


ALGORITHMS: dict[str, Algorithm] = {
    name: Algorithm(
        ESTIMATORS[name],
        critic=facts.critic,
        groups=facts.groups,
        whiten=facts.whiten,
        aggregate=AGGREGATES[facts.aggregate],
        kl_in=facts.kl_in,
    )
    for name, facts in FACTS.items()
}
"""What `PPOConfig.algorithm` may name."""


def compose(config: PPOConfig) -> Algorithm:
    """Return the algorithm that the settings name, with what they change about it."""
    changes: dict[str, Any] = {}
    if config.kl_in is not None:
        changes["kl_in"] = config.kl_in
    if config.policy_loss is not None:
        changes["policy_loss"] = POLICY_LOSSES[config.policy_loss]
    if config.aggregate == "constant":
        changes["aggregate"] = partial(_constant, length=config.aggregate_length or 1)
    elif config.aggregate is not None:
        changes["aggregate"] = AGGREGATES[config.aggregate]
    return replace(ALGORITHMS[config.algorithm], **changes)


def kl_kind(config: PPOConfig, algorithm: Algorithm) -> KLKind:
    """Return the estimator of the KL: the one set, else k1 in the reward and k3 in the loss."""
    return config.kl_estimator or ("k1" if algorithm.kl_in == "reward" else "k3")
