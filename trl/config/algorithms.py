"""What is known of each algorithm without torch: settings, recipes and the algorithms read it.

A new algorithm is an entry here, and what it makes of the rewards an entry of the same name in
`trl.optimization.algorithms.ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    settings: Mapping[str, float] = field(default_factory=dict)
    """What settings of `PPOConfig` are that are None."""


FACTS = {
    "ppo": Facts(critic=True, whiten=True),
    "vapo": Facts(
        critic=True,
        whiten=True,
        settings={
            "gae_lambda_value": 1.0,
            "length_adaptive": 0.05,
            "cliprange_high": 0.28,
            "positive_coef": 0.1,
            "value_pretraining": 50,
        },
    ),
    "rloo": Facts(groups=True, aggregate="sequence_sum"),
    "grpo": Facts(groups=True, aggregate="sequence", kl_in="loss"),
    "dr_grpo": Facts(groups=True, aggregate="sequence_sum", kl_in="loss"),
    "reinforce++": Facts(whiten=True),
}
"""What `PPOConfig.algorithm` may name."""

CORRECTIONS = {
    "tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "dppo": (-0.15, 0.15),
    "clip": (0.8, 1.2),
    "geometric": (0.99, 1.01),
}
"""What `PPOConfig.correction` may name, and its bounds: of ratios; of dppo, of changes of a
probability."""

if TYPE_CHECKING:
    AlgorithmName = str
    CorrectionName = str
else:
    AlgorithmName = Literal[*FACTS]
    CorrectionName = Literal[*CORRECTIONS]
