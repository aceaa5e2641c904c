"""What is known of each algorithm without torch: settings, recipes and the algorithms read it.

A new algorithm is an entry here, and what it makes of the rewards an entry of the same name in
`trl.optimization.algorithms.ESTIMATORS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Facts:
    """How an algorithm differs from others."""

    critic: bool = False
    """Whether it trains values, which its advantages need."""
    groups: bool = False
    """Whether it compares several responses to each query. Its advantages are then the same for
    all tokens of a response."""
    whiten: bool = False
    """Whether advantages are whitened over the batch of all processes."""
    aggregate: Literal["token", "sequence", "sequence_sum"] = "token"
    """How the losses of tokens are averaged, unless told otherwise."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty stands, unless told otherwise."""


FACTS = {
    "ppo": Facts(critic=True, whiten=True),
    "rloo": Facts(groups=True, aggregate="sequence_sum"),
    "grpo": Facts(groups=True, aggregate="sequence", kl_in="loss"),
    "dr_grpo": Facts(groups=True, aggregate="sequence_sum", kl_in="loss"),
    "reinforce++": Facts(whiten=True),
}
"""What `PPOConfig.algorithm` may name."""

if TYPE_CHECKING:
    AlgorithmName = str
else:
    AlgorithmName = Literal[*FACTS]
