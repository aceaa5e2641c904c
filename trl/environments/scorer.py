"""What environments gave, as scores."""

from __future__ import annotations

import torch

from trl.batch import Rollout
from trl.config.errors import refuse
from trl.evaluation.weighted_sum import at_last_token
from trl.scored import Scored

__all__ = ["EnvironmentReward"]


class EnvironmentReward:
    """The rewards of the turns, and of `get_reward` at the end: `Rollout.turn_rewards`.

    A reward of a turn counts at the last token that the policy wrote in it.
    """

    name = "environment"

    def __call__(self, rollout: Rollout) -> Scored:
        """Return what the environments gave: [B, R], or [B] if all of it came at the ends.

        Raises:
            ValueError: if the rollout is not one of `Episodes`.
        """
        if rollout.turn_rewards is None:
            rule, fix = "have turn_rewards", "sample it with trl.environments.Episodes"
            refuse("rollout", rule, "None", fix)
        rewards = rollout.turn_rewards.cpu()
        totals = rewards.sum(1)
        at_end = torch.equal(rewards, at_last_token(totals, rollout.response_mask.cpu()))
        return Scored(totals if at_end else rewards)
