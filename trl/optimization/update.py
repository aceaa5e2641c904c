"""What is known of one optimiser update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PassStats(NamedTuple):
    """Statistics of one forward and backward pass over a part of a minibatch."""

    shares: dict[str, Tensor]
    """By name, this pass's share [] of the mean over the minibatch's tokens."""
    ratio: Tensor
    """[N] importance ratio of each token of the pass."""
    advantages: Tensor
    """[N] its advantage."""


@dataclass
class Update:
    """Statistics of one update: means over the tokens of its minibatch, over all processes."""

    means: dict[str, float]
    """By name, in the units that docs/metrics.md gives of the figure `ppo/<name>`: nats per token
    of KL and entropy, score² of the value's loss and error, shares of clipped tokens."""
    tokens: float
    """Response tokens of the minibatch, over all processes."""
    ratio: Tensor
    """[N] importance ratios π/π_old of this process's tokens, without a unit."""
    advantages: Tensor
    """[N] advantages of this process's tokens, in units of the score; of its spread if whitened."""
    grad_norm: float = 0.0
    """Norm of the gradient before clipping, in units of the loss per unit of weight."""
    applied: bool = False
    """Whether the weights took the step."""

    @classmethod
    def of_passes(
        cls, passes: Sequence[PassStats], tokens: float, reduce: Callable[[Tensor], Tensor]
    ) -> Update:
        """Add up the shares of all passes and, by `reduce`, of all processes."""
        names = list(passes[0].shares)
        shares = torch.stack([torch.stack(list(part.shares.values())) for part in passes])
        means = reduce(shares.sum(0)).tolist()  # the only wait for the device in an update
        return cls(
            means=dict(zip(names, means, strict=True)),
            tokens=tokens,
            ratio=torch.cat([part.ratio for part in passes]),
            advantages=torch.cat([part.advantages for part in passes]),
        )
