"""The loss of an update, put together from what the algorithm and the settings say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl.batch import ResponseOutput
from trl.config import PPOConfig
from trl.core import kl_estimate
from trl.optimization import bins
from trl.optimization.algorithms import Algorithm, Counts, kl_kind
from trl.optimization.corrections import corrected
from trl.optimization.losses import clipped_value_loss, token_mean
from trl.optimization.update import PassStats


class Targets(NamedTuple):
    """What the updates of a step work with, all [B, R] and without gradient."""

    old_logprobs: Tensor
    """Of the weights before the first update."""
    old_values: Tensor
    """Likewise."""
    mask: Tensor
    """Of the tokens that count: all of a response, or none if nothing has a say on it."""
    advantages: Tensor
    returns: Tensor | None = None
    """What the values are to be; None: they are not trained."""
    ref_logprobs: Tensor | None = None
    """Of the reference; None: there is none."""
    behaviour_logprobs: Tensor | None = None
    """Of what wrote the tokens, if that is not the policy before the first update."""
    positive: Tensor | None = None
    """Weights of `positive_weights`; None: good responses are not imitated."""

    def select(self, rows: Tensor, width: int) -> Targets:
        """Return the given rows, and of them the first `width` columns."""
        kept: Any = (None if column is None else column[rows, :width] for column in self)
        return Targets(*kept)


def objective(
    new: ResponseOutput,
    targets: Targets,
    mask: Tensor,
    counts: Counts,
    algorithm: Algorithm,
    config: PPOConfig,
    *,
    kl_coef: float,
    only_values: bool = False,
) -> tuple[Tensor, PassStats]:
    """This pass's share of the loss, and of the statistics, of its minibatch.

        L = ⟨w·L_π⟩ + vf_coef·⟨L_V⟩ + β·⟨KL⟩ − entropy_coef·⟨H⟩ + positive_coef·L_NLL + L_router

    ⟨·⟩ is the algorithm's average, and w corrects for what really sampled. L_V only with a critic,
    the KL only where it is not a part of the reward, L_NLL only where good responses are imitated,
    L_router only for a mixture of experts that balances them: each pass's weighs as much as it has
    response tokens. In the statistics, losses are averaged like that, all else is a mean over
    tokens.

    Args:
        new: Log-probs, values, entropies [B, R] under the weights now, with gradient.
        targets: The same rows and columns.
        mask: [B, R].
        counts: Of the whole minibatch over all processes.
        algorithm: What the loss is put together from.
        config: Coefficients and clip ranges.
        kl_coef: β.
        only_values: Leave everything but the value loss out of the total.
    """
    policy_loss, ratio, columns = _policy_loss(new, targets, mask, algorithm, config)
    losses, weights = {"loss/policy": policy_loss}, {"loss/policy": 1.0}
    if targets.positive is not None:
        columns["loss/positive"] = -targets.positive * new.logprobs
        columns["policy/positive"] = (targets.positive > 0).float()
        weights["loss/positive"] = config.in_force("positive_coef")
    if targets.returns is not None:
        losses["loss/value"], value_clipped = clipped_value_loss(
            new.values, targets.old_values, targets.returns, cliprange_value=config.cliprange_value
        )
        if new.bins is not None:  # of which no clipping is known
            said = new.bins
            losses["loss/value"] = bins.two_hot_loss(said.logits, targets.returns, said.centres)
            value_clipped = torch.zeros_like(value_clipped)
        weights["loss/value"] = config.vf_coef
        columns |= {
            "val/vpred": new.values,
            "val/error": (new.values - targets.returns).square(),
            "val/clipfrac": value_clipped.float(),
            "val/gap": (new.values - targets.old_values).abs() / (1 + new.values.abs()),
        }
    if targets.ref_logprobs is not None and algorithm.kl_in == "loss":
        kind = kl_kind(config, algorithm)
        losses["loss/kl"] = kl_estimate(new.logprobs, targets.ref_logprobs, kind)
        weights["loss/kl"] = kl_coef
    if new.router is not None:
        columns["loss/router"], weights["loss/router"] = new.router, 1.0
    means = {name: algorithm.aggregate(loss, mask, counts) for name, loss in losses.items()}
    means |= {name: token_mean(column, mask, counts.tokens) for name, column in columns.items()}
    if only_values:
        weights = {"loss/value": config.vf_coef}
    total: Any = sum(weight * means[name] for name, weight in weights.items())
    if config.entropy_coef and not only_values:
        total = total - config.entropy_coef * algorithm.aggregate(new.entropy, mask, counts)
    means["loss/total"] = total
    detached = {name: mean.detach() for name, mean in means.items()}
    return total, PassStats(detached, ratio.detach()[mask], targets.advantages[mask])


def _policy_loss(
    new: ResponseOutput, targets: Targets, mask: Tensor, algorithm: Algorithm, config: PPOConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the policy's loss [B, R], its ratio [B, R] and what is known of each token."""
    clip = {name: config.in_force(name) for name in ("cliprange", "cliprange_high", "dual_clip")}
    loss, ratio, clipped = algorithm.policy_loss(
        new.logprobs, targets.old_logprobs, targets.advantages, mask, **clip
    )
    log_ratio = new.logprobs - targets.old_logprobs
    columns = {
        "policy/entropy": new.entropy,
        "policy/approxkl": 0.5 * log_ratio.square(),
        "policy/policykl": log_ratio,
        "policy/abs_log_ratio": log_ratio.abs(),
        "policy/mean_ratio": ratio,
        "policy/clipfrac": clipped.float(),
        "policy/advantages_mean": targets.advantages,
    }
    if targets.behaviour_logprobs is not None:
        sampled = targets.old_logprobs, targets.behaviour_logprobs
        weight, measured = corrected(*sampled, mask, targets.advantages, config)
        columns |= measured
        loss = loss if weight is None else weight * loss
    return loss, ratio, columns
