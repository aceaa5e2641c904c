"""Adam on a CPU, over gradients in low precision, in pieces that stay in its cache.

No gradient in float32 is ever whole in memory: 0.24 of 3.0 GiB in a step of GPT-2. A piece is
converted, clipped and used, and the weight's copy in low precision made anew, while it is in the
cache; with the whole of it each of these passes through memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Numbers of a weight that are worked on at a time: they, their moments, gradient and copy take
# 20 MB. Half and twice as many take as long; an eighth, half as long again.
_PIECE = 2**20


class LowGradient(NamedTuple):
    """The gradient of a weight in low precision, and the copy that follows the weight."""

    weight: nn.Parameter
    gradient: Tensor
    copy: Tensor


def can_update_in_pieces(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `update_in_pieces` does what `optimizer.step` would, seen from outside too."""
    return (
        type(optimizer) is torch.optim.Adam
        and not any(
            (
                optimizer._optimizer_step_pre_hooks,
                optimizer._optimizer_step_post_hooks,
                _global_optimizer_pre_hooks,
                _global_optimizer_post_hooks,
            )
        )
        and all(
            group["fused"]
            and not group["amsgrad"]
            and not group["capturable"]
            and not group.get("decoupled_weight_decay")
            and all(weight.device.type == "cpu" for weight in group["params"])
            for group in optimizer.param_groups
        )
    )


@torch.no_grad()
def update_in_pieces(
    optimizer: torch.optim.Optimizer, gradients: Sequence[LowGradient], factor: float = 1.0
) -> None:
    """Make the step of a fused `torch.optim.Adam` for weights whose `.grad` is None.

    The numbers are those of `optimizer.step` for the same gradients in float32.

    Args:
        optimizer: For which `can_update_in_pieces`; weights that it does not own are left alone.
        gradients: Of contiguous weights, gradients and copies.
        factor: What the gradients are multiplied by first: that of clipping.
    """
    of_weights = {id(one.weight): one for one in gradients}
    room = torch.empty(_PIECE, dtype=torch.float32, device="cpu")
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(weight) in of_weights:
                _update(of_weights[id(weight)], optimizer.state[weight], group, factor, room)


def _update(
    one: LowGradient, state: dict[str, Any], group: dict[str, Any], factor: float, room: Tensor
) -> None:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(one.weight)
        state["exp_avg_sq"] = torch.zeros_like(one.weight)
    scale = None if factor == 1 else torch.tensor(1 / factor, dtype=torch.float32, device="cpu")
    for weight, copy, gradient, m, v in _pieces(
        one.weight, one.copy, one.gradient, state["exp_avg"], state["exp_avg_sq"]
    ):
        adam(
            [weight],
            [room[: len(weight)].copy_(gradient)],
            [m],
            [v],
            [],
            [state["step"].clone()],  # it counts on at every call
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=scale,
        )
        copy.copy_(weight)
    state["step"] += 1


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut contiguous tensors of one shape into the same pieces [n]."""
    return zip(*(tensor.detach().view(-1).split(_PIECE) for tensor in tensors), strict=True)
