"""Weights of which each process holds a part: torch's FSDP2 around what reads a rollout.

A layer is gathered when it is computed, forward and backward, and given back after; embeddings,
norms and heads, the root, for as long as a pass goes on. Each gathering waits for all processes,
so all of them make the same number of passes.

At low precision the blocks of a layer that hold matrices are gathered in it, and their gradients
added up in float32 (`MixedPrecisionPolicy`): the numbers are those of autocast. Norms and heads
stay in float32, as autocast leaves them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl.anatomy import language_model
from trl.config.errors import refuse
from trl.kernels.sharded import is_sharded
from trl.kernels.stored import Stored, held_of
from trl.models.critic import critic_of
from trl.models.response import ResponseModel

_INSTEAD = "start plain processes (torchrun --nproc-per-node 2 …) and set shard=True (of a recipe "
_INSTEAD += "model.shard), which shards by torch's FSDP2"


def check_plain_processes(accelerator: Accelerator) -> None:
    """Raise a ValueError for an accelerator that shards models in ways of its own."""
    kind = accelerator.distributed_type
    parallel = getattr(accelerator, "parallelism_config", None)
    found = {
        "FSDP": kind == DistributedType.FSDP,
        "DeepSpeed": kind == DistributedType.DEEPSPEED,
        "Megatron-LM": kind == DistributedType.MEGATRON_LM,
        "tensor parallelism": parallel is not None and parallel.tp_enabled,
    }
    for name in (name for name, there in found.items() if there):
        refuse("accelerator", "leave the weights to the trainer", f"one with {name}", _INSTEAD)


def check_can_shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise a ValueError if the weights of a model cannot be sharded."""
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        refuse("shard", "be False with this torch", torch.__version__, "install torch >= 2.13")
    if accelerator.mixed_precision == "fp16":
        refuse(
            "precision", "be fp32 or bf16 with `shard`", "'fp16'", "take bf16, which scales none"
        )
    if (critic := critic_of(model)) is not None:
        layers = [_layers(language_model(each)) for each in (model, critic)]
        of_policy, own = ({w for part in parts for w in part.parameters()} for parts in layers)
        if of_policy & own:  # a weight is cut once, in one layer
            fix = "train all of its weights, take critic='same', or leave `shard` out"
            refuse("critic", "share no layers with the policy with `shard`", "one that does", fix)
    if getattr(model, "is_quantized", False) or any(
        w.dtype.itemsize < 2 for w in model.parameters()
    ):
        refuse("model", "not be quantised with `shard`", fix="load it in bfloat16 or float32")


@torch.no_grad()
def take_from_first(module: nn.Module, device: torch.device) -> None:
    """Let each process begin with the weights of the first, as DDP does.

    Nothing is written where they are the same already: what lies in a file stays there.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        sent = (held := held_of(tensor)).to(device, copy=True)
        torch.distributed.broadcast(sent, src=0)
        if not torch.equal(sent := sent.to(held.device), held):
            if isinstance(tensor, Stored):
                tensor.data = sent.float()
            else:
                tensor.copy_(sent)


def without_memory(responder: ResponseModel) -> ResponseModel:
    """Return a copy of a model whose weights are on the device "meta", for `shard` to fill."""
    return copy.deepcopy(
        responder, {id(weight): _empty(weight) for weight in responder.parameters()}
    )


def _empty(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().to("meta"), weight.requires_grad)


def shard(
    responder: ResponseModel,
    accelerator: Accelerator,
    low: torch.dtype | None,
    filled_from: nn.Module | None = None,
    change: Callable[[nn.Parameter, Tensor], None] | None = None,
    *,
    offload: bool = False,
) -> None:
    """Let each process keep its part of a model's weights alone; they are other objects then.

    The parts are taken from one weight after the other, which is let go of.

    Args:
        responder: Around the model; it is what must be called for a pass.
        accelerator: Of this process.
        low: The precision of autocast, None: there is none.
        filled_from: Of a copy `without_memory`: the model it is a copy of, which is sharded.
        change: Is given each weight, and its numbers, which it may change before they are cut.
        offload: Keep the parts in the CPU's memory; what is gathered of them is on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    how: dict[str, Any] = {"reshard_after_forward": True}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=accelerator.device.type != "cpu")
    how["mesh"] = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    were = {} if filled_from is not None else _emptied(responder)
    for layer in (layer for reader in responder.readers for layer in _layers(reader.plain)):
        for part in [layer] if low is None else _blocks(layer):
            fully_shard(part, mp_policy=policy if low else MixedPrecisionPolicy(), **how)
    # By itself the root would keep its weights after a pass without gradient: the optimiser would
    # then change parts that nothing computes with.
    root: Any = fully_shard(responder, **how)
    if filled_from is not None:
        parts = dict(filled_from.named_parameters(remove_duplicate=False))
        _fill(responder.model, lambda name, like: parts[name].detach().to(like.dtype, copy=True))
    else:
        place = torch.device("cpu") if offload else accelerator.device
        _fill(responder.model, lambda name, like: _part_of(were[name], like, place, change))
    register_fsdp_forward_method(root, "trunk_states")
    root._get_fsdp_state()._lazy_init()  # before a layer is called without it, for sampling


def _emptied(responder: ResponseModel) -> dict[str, nn.Parameter]:
    """Return the weights of a model by name, and put empty ones on "meta" in their places."""
    were = dict(responder.model.named_parameters(remove_duplicate=False))
    empty = {weight: _empty(weight) for weight in were.values()}  # tied ones stay one
    for module in responder.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = empty[weight]
    return were


@torch.no_grad()
def _part_of(
    weight: nn.Parameter,
    like: Any,
    place: torch.device,
    change: Callable[[nn.Parameter, Tensor], None] | None,
) -> Tensor:
    """Return this process's part of a weight, and let go of what that held."""
    from torch.distributed.tensor import DTensor

    numbers = weight.detach()
    if change is not None:
        numbers = numbers.to(weight.dtype, copy=True)
        change(weight, numbers)
    mesh = like.device_mesh
    each = -(-len(weight) // mesh.size())  # rows, the last may have fewer
    first = mesh.get_local_rank() * each
    own = numbers[first : first + each].to(place, copy=True)
    if not isinstance(weight, Stored):  # the optimiser, or a user, may have it still
        weight.data = weight.new_empty(0)
    where: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    # It goes to the mesh's device first, whatever that of `own` is.
    return DTensor.from_local(own, mesh, like.placements, **where).to(place)


def _fill(empty: nn.Module, part_of: Callable[[str, Any], Tensor]) -> None:
    """Give a sharded model without memory its parts.

    Args:
        empty: The model.
        part_of: Given the name of a weight and the empty one, returns this process's part.
    """
    places = list(empty.named_parameters(remove_duplicate=False))
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for name, weight in places:
        if weight not in filled:
            filled[weight] = nn.Parameter(part_of(name, weight), weight.requires_grad)
    state = {name: filled[weight] for name, weight in places}  # tied ones stay one
    empty.load_state_dict(state, strict=False, assign=True)


def _layers(plain: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model, of an encoder too, that are computed one after the other."""
    names = set(plain._no_split_modules or ())
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for part in plain.modules():
        named = isinstance(part, GradientCheckpointingLayer) or type(part).__name__ in names
        if named and part not in inside:
            layers.append(part)
            inside.update(part.modules())
    return layers


def _blocks(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a layer, attention and MLP, that hold its matrices."""
    for part in layer.children():
        if isinstance(part, nn.ModuleList):
            yield from _blocks(part)
        elif any(weight.ndim > 1 for weight in part.parameters()):
            yield part


@contextmanager
def gathered(root: Any) -> Iterator[None]:
    """Hold all weights whole inside, on every process; they must not change."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    try:
        root.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        yield
    finally:
        root.set_reshard_after_forward(True)
        root.reset_iter_state()  # a text of other length on each process leaves other traces


def even_passes(model: nn.Module, passes: list[Tensor]) -> list[Tensor]:
    """Return as many passes as the process with the most makes: the last of them again.

    Args:
        model: What is called; with whole weights nobody waits, and the passes stay.
        passes: The rows of each.
    """
    if not is_sharded(next(model.parameters())):
        return passes
    most = torch.tensor(len(passes), device=passes[0].device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return passes + passes[-1:] * (int(most) - len(passes))
