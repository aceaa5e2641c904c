"""What is known of one optimiser update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl.config.errors import refuse, shown


class PassStats(NamedTuple):
    """Statistics of one forward and backward pass over a part of a minibatch."""

    shares: dict[str, Tensor]
    """By name, this pass's share [] of the mean over the minibatch's tokens."""
    ratio: Tensor
    """[N] importance ratio of each token of the pass."""
    advantages: Tensor
    """[N] its advantage."""


def checked_loss(found: Any) -> tuple[Tensor, PassStats]:
    """Return what `PPOTrainer.loss` gave, with the loss itself as the figure `loss/total`.

    Raises:
        TypeError: if it is no pair of a loss [] with a gradient, and `PassStats` of numbers [].
    """
    rule = "return (loss, stats): what is differentiated, a tensor [], and what is told"
    fix = "return loss, stats, both as `super().loss(...)` gives them"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], PassStats):
        refuse("loss", rule, type(found).__name__, fix, error=TypeError)
    loss, stats = found
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        got = (
            "one without a gradient" if isinstance(loss, Tensor) and not loss.ndim else shown(loss)
        )
        got = f"a tensor {list(loss.shape)}" if getattr(loss, "ndim", 0) else got
        fix = "add terms as token_mean(x, mask, counts.tokens), not detached"
        refuse("loss", rule, got, fix, error=TypeError)
    for name, share in stats.shares.items():
        if not isinstance(share, Tensor) or share.ndim:
            got = f"{list(share.shape) if isinstance(share, Tensor) else share!r} for {name!r}"
            fix = "take token_mean(x, mask, counts.tokens).detach()"
            refuse("stats.shares", "be tensors [], a number each", got, fix, error=TypeError)
    stats.shares["loss/total"] = loss.detach()
    return loss, stats


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
