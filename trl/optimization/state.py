"""What a resumed run needs of its trainer, as plain values and tensors on the CPU."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trl.batch import odd_kind
from trl.config.errors import refuse, shown
from trl.kernels.sharded import is_sharded, own_part, part_like
from trl.optimization.kl import FixedKLController
from trl.optimization.rewards import RunningMoments

_DAMAGED = "the file is damaged, or of another version"


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimiser, and by what to tell whether it fits another.

    Tensors are copied to the CPU, but for sharded ones, which are the optimiser's own.
    """

    def on_cpu(tensor: Tensor) -> Tensor:
        return tensor if is_sharded(tensor) else tensor.detach().to("cpu", copy=True)

    state = tree_map_only(Tensor, on_cpu, optimizer.state_dict())
    return {"kind": _kind(optimizer), "shapes": _shapes(optimizer), "state": state}


def fitting_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an optimiser's state, cut as its weights are if those are sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept: dict[str, Any] = copy.deepcopy(dict(state))
    for index, moments in kept["state"].items():
        for name, value in moments.items():
            moments[name] = part_like(value, weights[index])
    return kept


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
        refuse(f"{name}` of `state", "be what `state_dict` returned", shown(state[name]), _DAMAGED)
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
            set(part) == {"rate", "moved", "spent", "line"}
            and all(math.isfinite(x) for x in (part["moved"], *part["line"]))
            and len(part["line"]) == 5
            and 0 <= part["spent"] < math.inf
            and 0 < part["rate"] <= 100  # from nothing it could not grow
        )
    ),
    "value_pretraining": lambda part: (
        type(part["done"]) is int
        and part["done"] >= 0
        and all(math.isfinite(x) for x in part.get("explained", ()))
    ),
    "shuffle": lambda part: torch.Generator().set_state(part.cpu()),
    "optimizer": lambda part: (
        set(part) == {"kind", "shapes", "state"}
        and {"state", "param_groups"} <= set(part["state"])
        and isinstance(part["shapes"], list)
        and all(isinstance(group["params"], list) for group in part["state"]["param_groups"])
        and all(isinstance(kept, Mapping) and kept for kept in part["state"]["state"].values())
    ),
    "scaler": lambda part: part is None or 0 < part["scale"] < math.inf,
}
"""The parts of a trainer's state, and what says False, or raises, if one is not such a part."""

_LIKE_WEIGHTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}
_NOT_NEGATIVE = re.compile("step|.*(sq|square|sum|var).*")
"""What an optimiser keeps of each weight: names that torch gives it."""


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the state is that of such an optimiser of such weights."""
    kind, shapes, others = _kind(optimizer), _shapes(optimizer), state["shapes"]
    fix = "make the trainer with the settings of the run that is resumed"
    if state["kind"] != kind:
        rule = f"be that of an optimiser of the same kind, {kind}"
        refuse("state", rule, f"that of {state['kind']}", fix)
    groups, kept = state["state"]["param_groups"], state["state"]["state"]
    own, flat = optimizer.state_dict()["param_groups"], [shape for each in shapes for shape in each]
    same = [group["params"] for group in groups] == [group["params"] for group in own]
    if others != shapes or not same or not kept.keys() <= set(range(len(flat))):
        rule = f"be that of {len(flat)} weights in {len(shapes)} group(s), all of the same shapes"
        why = "another part of the model, or another model, was trained"
        refuse("state", rule, f"{sum(map(len, others))} in {len(others)}", why)
    for index, (group, mine) in enumerate(zip(groups, own, strict=True)):
        for name in mine.keys() - {"params", "foreach", "fused"}:  # the last two: speed alone
            value = group.get(name, mine[name])  # torch fills in those of newer versions
            if not _alike(value, mine[name]) or (name == "eps" and value != mine[name]):
                rule, place = (
                    f"be as the trainer's, {mine[name]!r}",
                    f"param_groups[{index}].{name}",
                )
                refuse(f"optimizer.{place}", rule, repr(value), fix)
    for index, moments in kept.items():
        _check_moments(f"optimizer.state[{index}]", moments, flat[index])


def _alike(value: Any, mine: Any) -> bool:
    """Return whether a setting may go on for another: any sound number, but the same switch."""
    if isinstance(mine, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(mine)
        return same and all(map(_alike, value, mine))
    if isinstance(mine, int | float | Tensor) and not isinstance(mine, bool):
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        return number and math.isfinite(value) and bool(value >= 0 or mine < 0)
    return type(value) is type(mine) and bool(value == mine)


def _check_moments(where: str, kept: Mapping[str, Any], shape: list[int]) -> None:
    """Raise a ValueError unless what an optimiser keeps of a weight are sound numbers."""
    shapes = dict.fromkeys(_LIKE_WEIGHTS, shape) | {"step": []}
    for name, value in kept.items():
        if value is None and name == "momentum_buffer":
            continue
        number = isinstance(value, int | float | Tensor)
        found = list(getattr(value, "shape", ())) if number else type(value).__name__
        if found != shapes.get(name, found):
            refuse(f"{where}.{name}", f"have the shape {shapes[name]}", found, _DAMAGED)
        numbers = torch.as_tensor(own_part(value) if number else 0)
        odd = odd_kind(numbers) or (numbers.dtype if numbers.is_complex() else None)
        if odd or not numbers.isfinite().all():
            refuse(f"{where}.{name}", "be finite real numbers", odd or "NaN, infinity", _DAMAGED)
        if _NOT_NEGATIVE.fullmatch(name) and (numbers < 0).any():
            refuse(f"{where}.{name}", "be >= 0", float(numbers.min()), _DAMAGED)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimiser of torch, also inside of accelerate's."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the weights of each group."""
    return [[list(weight.shape) for weight in group["params"]] for group in optimizer.param_groups]
