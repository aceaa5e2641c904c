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
    tokens: float
    ratio: Tensor
    """[N] importance ratios of this process's tokens."""
    advantages: Tensor
    """[N] advantages of this process's tokens."""
    grad_norm: float = 0.0
    """Norm of the gradient before clipping."""
    applied: bool = False

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
