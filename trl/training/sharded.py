"""What a checkpoint holds of sharded weights: written by all processes, each its own parts.

torch's distributed checkpoint cuts the tensors anew where they are read, so that a run can go on
with another number of processes, or a single one. The rest of the state stays in its own file, in
which an empty tensor on the device "meta" stands for each that is sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_with_path

from trl.compute.peers import meet
from trl.kernels.sharded import is_sharded
from trl.training.checkpoints import Checkpoints, partial_of
from trl.training.resume import STATE

PARTS = "sharded"
"""The folder in a checkpoint."""


def taken_apart(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a state without its sharded tensors, and these by where in it they were."""
    parts: dict[str, Tensor] = {}

    def take(path: Any, value: Any) -> Any:
        if not is_sharded(value):
            return value
        parts["/".join(map(str, path))] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return tree_map_with_path(take, state), parts


def _write_parts(parts: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Write this process's parts of sharded tensors, while the others write theirs."""
    from torch.distributed import checkpoint as distributed  # takes a second to import

    distributed.save(dict(parts), checkpoint_id=checkpoint / PARTS)


def put_together(state: dict[str, Any], checkpoint: Path, model: nn.Module) -> dict[str, Any]:
    """Return a state with its sharded tensors, read from a checkpoint.

    Args:
        state: The rest of it.
        checkpoint: Its folder.
        model: Says how tensors are to be cut: as its own weights, by all processes at once, or not
            at all, by each for itself.
    """
    parts: dict[str, Tensor] = {}
    weight = next(model.parameters())
    make = _maker_like(weight)

    def put(path: Any, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        parts[name := "/".join(map(str, path))] = make(value)
        return parts[name]

    whole = tree_map_with_path(put, state)
    if parts:
        from torch.distributed import checkpoint as distributed

        alone = not is_sharded(weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # if alone
            distributed.load(parts, checkpoint_id=checkpoint / PARTS, no_dist=alone)
    return whole


def _maker_like(weight: Any) -> Callable[[Tensor], Tensor]:
    """Return what makes room for a tensor, cut as a weight is."""
    if not is_sharded(weight):
        return lambda empty: torch.empty(empty.shape, dtype=empty.dtype)
    from torch.distributed import tensor as of_parts

    mesh, placements = weight.device_mesh, weight.placements

    def make(empty: Tensor) -> Tensor:
        how = {"dtype": empty.dtype, "device_mesh": mesh, "placements": placements}
        return of_parts.empty(*empty.shape, **how).to(weight.device)

    return make


def write_together(
    checkpoints: Checkpoints,
    state: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> None:
    """Write a checkpoint: the first process all but the parts, and these every process at once.

    Args:
        checkpoints: Those of the run; every process must see their folder.
        state: What the first process writes, as plain values and tensors.
        parts: Of this process; without any, the first process writes alone.
        accelerator: Of this process.
    """

    def write(at: Path) -> None:
        torch.save(state, at / STATE)
        if parts:
            meet()
            _write_parts(parts, at)

    if accelerator.is_main_process:
        checkpoints.write(state["step"], write)
    elif parts:
        meet()  # until the folder is there
        _write_parts(parts, partial_of(checkpoints.place(state["step"])))
    meet()
