"""Tensors of which each process holds a part (`DTensor`), and plain ones alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether this process holds but a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Any) -> Tensor:
    """Return what this process holds, in the tensor's own memory; all of it of a plain one."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def device_of(tensor: Any) -> torch.device:
    """Return where a tensor is computed with; its parts may be in the CPU's memory meanwhile."""
    device: torch.device = tensor.device
    if not is_sharded(tensor) or (kind := tensor.device_mesh.device_type) == device.type:
        return device
    return torch.device(kind, torch.accelerator.current_device_index())


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor; of a sharded one every process must ask for it at once."""
    of_all: Tensor = tensor.to(device_of(tensor)).full_tensor() if is_sharded(tensor) else tensor
    return of_all


def part_like(tensor: Any, like: Any) -> Any:
    """Return a whole tensor, which all processes have, sharded as another of its shape is; what has
    another shape, or is no tensor, stays.
    """
    if not is_sharded(like) or is_sharded(tensor) or getattr(tensor, "shape", ()) != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    where = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), *where, src_data_rank=None).to(like.device)


def agreed(flag: bool, weights: Sequence[Tensor]) -> bool:
    """Return whether a flag is set; for sharded weights, on all processes that have parts."""
    if not any(map(is_sharded, weights)):
        return flag
    low = torch.tensor(int(flag), device=device_of(weights[0]))
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    return bool(low)
