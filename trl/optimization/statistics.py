"""The statistics of a step, by the names of the 2020 trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.batch import Rollout
from trl.core import masked_mean, masked_var, stats_to_np
from trl.optimization.losses import explained_variance
from trl.optimization.objective import Targets
from trl.optimization.update import Update
from trl.scored import totals


def step_statistics(
    rollout: Rollout,
    scores: Tensor,
    targets: Targets,
    non_score_rewards: Tensor,
    updates: Sequence[Update],
    kl_coef: float,
    gathered: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Return the 30 stats of the 2020 trainer, less those of time, and some more.

    What was not there to be measured is left out, not 0: without a critic `ppo/returns/…` and
    `ppo/val/…`, without the rollout's word on it `objective/ended`.

    Args:
        rollout: B rows.
        scores: [B] or [B, R] as they entered the rewards.
        targets: Without a reference what would be measured against it is NaN; without returns
            there is no critic.
        non_score_rewards: [B, R] the KL part of the rewards.
        updates: At least one.
        kl_coef: β of this step.
        gathered: Returns the rows of all processes.
    """
    scores = gathered(totals(scores))
    logprobs, values = gathered(targets.old_logprobs), gathered(targets.old_values)
    non_score_rewards = gathered(non_score_rewards)
    ref = targets.ref_logprobs  # not measured is not the same as 0
    ref_logprobs = torch.full_like(logprobs, float("nan")) if ref is None else gathered(ref)
    kl = logprobs - ref_logprobs  # [B, R], 0 outside the mask
    stats: dict[str, Any] = {
        "objective/kl": kl.sum(1).mean(),
        "objective/kl_dist": kl,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -logprobs.sum(1).mean(),
        "objective/scores": scores.mean(),
        "objective/constant_scores": float((scores == scores[0]).all()),
        "ppo/mean_non_score_reward": non_score_rewards.sum(1).mean(),
        "ppo/updates": sum(update.applied for update in updates),
        "ppo/skipped_updates": sum(not update.applied for update in updates),
        "ppo/grad_norm": float(np.mean([update.grad_norm for update in updates])),
        "ppo/first_log_ratio": updates[0].means["policy/abs_log_ratio"],
        "ppo/policy/ratio": torch.cat([update.ratio for update in updates]),
        "ppo/policy/advantages": torch.cat([update.advantages for update in updates]),
    }
    if rollout.ended is not None:
        stats["objective/ended"] = gathered(rollout.ended.float()).mean()
    elsewhere = {"policy/abs_log_ratio", "policy/mean_ratio", "val/gap"}  # or nowhere
    for name in (name for name in updates[0].means if name not in elsewhere):
        stats[f"ppo/{name}"] = float(np.mean([update.means[name] for update in updates]))
    if targets.returns is not None:
        returns, mask = gathered(targets.returns), gathered(rollout.response_mask)
        variance = masked_var(returns, mask)
        error = stats["ppo/val/error"]
        stats |= {
            "ppo/returns/mean": masked_mean(returns, mask),
            "ppo/returns/var": variance,
            "ppo/val/mean": masked_mean(values, mask),
            "ppo/val/var": masked_var(values, mask),
            # That of 2020, by the mean error during the updates; then by the values at rollout.
            "ppo/val/var_explained": 1 - error / float(variance) if variance > 0 else 0.0,
            "ppo/val/explained_variance": explained_variance(values, returns, mask),
        }
    return stats_to_np(stats)
