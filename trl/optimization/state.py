"""What a resumed run needs of its trainer, as plain values and tensors on the CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trl.config.errors import refuse
from trl.optimization.kl import FixedKLController
from trl.optimization.rewards import RunningMoments

_DAMAGED = "the file is damaged, or of another version"


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimiser, and by what to tell whether it fits another."""
    on_cpu = tree_map_only(
        Tensor, lambda x: x.detach().to("cpu", copy=True), optimizer.state_dict()
    )
    return {"kind": _kind(optimizer), "shapes": _shapes(optimizer), "state": on_cpu}


def check_state(state: Any, optimizer: torch.optim.Optimizer, *, scaled: bool, auto: bool) -> None:
    """Raise a ValueError unless it is the state of a trainer with such an optimiser.

    Args:
        state: What is to be loaded, of any type.
        optimizer: Of the trainer.
        scaled: Whether the trainer scales gradients, as at fp16.
        auto: Whether its learning rate is "auto".
    """
    if not isinstance(state, Mapping) or set(state) != set(_PARTS):
        got = str(sorted(state)) if isinstance(state, Mapping) else type(state).__name__
        refuse("state", f"be what `state_dict` returned, with {sorted(_PARTS)}", got)
    for name, is_sound in _PARTS.items():
        with suppress(AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            if is_sound(state[name]) is not False:
                continue
        refuse(f"{name}` of `state", "be what `state_dict` returned", repr(state[name]), _DAMAGED)
    if scaled != (state["scaler"] is not None):
        rule = "be of the same precision as the trainer, and one of them is fp16, the other is not"
        refuse("state", rule, fix="set `precision` as in the run that is resumed")
    if auto != (state["auto_rate"] is not None):
        rule = 'be of the same kind of learning rate as the trainer, and one of them is "auto"'
        refuse("state", rule, fix="set `learning_rate` as in the run that is resumed")
    _check_optimizer(optimizer, state["optimizer"])


_PARTS: dict[str, Callable[[Any], Any]] = {
    "steps_done": lambda part: type(part) is int and part >= 0,
    "kl_controller": lambda part: FixedKLController(part["value"]),
    "score_moments": RunningMoments().load_state_dict,
    "auto_rate": lambda part: (
        part is None
        or (
            set(part) == {"rate", "moved", "spent", "rounding"}
            and all(0 <= x < math.inf for x in part.values())
        )
    ),
    "value_pretraining": lambda part: (
        set(part) == {"done", "best", "stale"} and min(part["done"], part["stale"]) >= 0
    ),
    "shuffle": lambda part: torch.Generator().set_state(part.cpu()),
    "optimizer": lambda part: (
        set(part) == {"kind", "shapes", "state"} and {"state", "param_groups"} <= set(part["state"])
    ),
    "scaler": lambda part: part is None or 0 < part["scale"] < math.inf,
}
"""The parts of a trainer's state, and what says False, or raises, if one is not such a part."""

_LIKE_WEIGHTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}
_NOT_NEGATIVE = re.compile("step|lr|eps|weight_decay|.*(sq|square|sum|var).*")
"""What an optimiser keeps of each weight, and its settings: names that torch gives them."""


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the state is that of such an optimiser of such weights."""
    kind, ours, theirs = _kind(optimizer), _shapes(optimizer), state["shapes"]
    if state["kind"] != kind:
        fix = "make the trainer with the settings of the run that is resumed"
        rule = f"be that of an optimiser of the same kind, {kind}"
        refuse("state", rule, f"that of {state['kind']}", fix)
    groups, kept = state["state"]["param_groups"], state["state"]["state"]
    if theirs != ours or [len(group["params"]) for group in groups] != list(map(len, ours)):
        weights, others = sum(map(len, ours)), sum(map(len, theirs))
        rule = f"be that of {weights} weights in {len(ours)} group(s), all of the same shapes"
        fix = "another part of the model, or another model, was trained"
        refuse("state", rule, f"{others} in {len(theirs)}", fix)
    for index, group in enumerate(groups):
        _check_numbers(f"optimizer.param_groups[{index}]", group, [])
    shapes = dict(enumerate(shape for group in ours for shape in group))
    if not kept.keys() <= shapes.keys():
        unknown = sorted(kept.keys() - shapes.keys(), key=str)
        refuse("optimizer.state", f"be of weights 0 … {len(shapes) - 1}", unknown)
    for index, moments in kept.items():
        _check_numbers(f"optimizer.state[{index}]", moments, shapes[index])


def _check_numbers(where: str, kept: Mapping[str, Any], shape: list[int]) -> None:
    """Raise a ValueError unless what an optimiser keeps are numbers that it can go on from."""
    for name, value in kept.items():
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if name in _LIKE_WEIGHTS and value is not None and found != shape:
            refuse(f"{where}.{name}", f"have the shape {shape} of its weight", found)
        if isinstance(value, int | float | Tensor) and torch.as_tensor(value).numel():
            lowest, highest = torch.aminmax(torch.as_tensor(value))
            if not (lowest.isfinite() and highest.isfinite()):
                refuse(f"{where}.{name}", "be finite", "NaN or infinity", _DAMAGED)
            if lowest < 0 and _NOT_NEGATIVE.fullmatch(name):
                refuse(f"{where}.{name}", "be >= 0", float(lowest), _DAMAGED)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimiser of torch, also inside of accelerate's."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the weights of each group."""
    return [[list(weight.shape) for weight in group["params"]] for group in optimizer.param_groups]
