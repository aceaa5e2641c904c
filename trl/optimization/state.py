"""What a resumed run needs of its trainer, as plain values and tensors on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trl.config.errors import refuse


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimiser, and by what to tell whether it fits another."""
    on_cpu = tree_map_only(
        Tensor, lambda x: x.detach().to("cpu", copy=True), optimizer.state_dict()
    )
    return {"kind": _kind(optimizer), "shapes": _shapes(optimizer), "state": on_cpu}


def check_state(state: Any, optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
    """Raise a ValueError unless it is the state of a trainer with such an optimiser.

    Args:
        state: What is to be loaded, of any type.
        optimizer: Of the trainer.
        scaled: Whether the trainer scales gradients, as at fp16.
    """
    if not isinstance(state, Mapping) or set(state) != set(_PARTS):
        got = str(sorted(state)) if isinstance(state, Mapping) else type(state).__name__
        refuse("state", f"be what `state_dict` returned, with {sorted(_PARTS)}", got)
    for name, is_sound in _PARTS.items():
        with suppress(KeyError, TypeError, ValueError, RuntimeError):
            if is_sound(state[name]):
                continue
        raise ValueError(
            f"`{name}` of `state` must be what `state_dict` returned, got {state[name]!r}: "
            "the file is damaged, or of another version."
        )
    if scaled != (state["scaler"] is not None):
        raise ValueError(
            "`state` must be of the same precision as the trainer: one of them is fp16, the other "
            "is not. Set `precision` as in the run that is resumed."
        )
    _check_optimizer(optimizer, state["optimizer"])


_PARTS: dict[str, Callable[[Any], bool]] = {
    "steps_done": lambda part: isinstance(part, int) and part >= 0,
    "kl_controller": lambda part: 0 <= part["value"] < math.inf,
    "score_moments": lambda part: all(math.isfinite(part[k]) for k in ("count", "mean", "squares")),
    "shuffle": lambda part: bool(torch.Generator().set_state(part.cpu())),
    "optimizer": lambda part: set(part) == {"kind", "shapes", "state"},
    "scaler": lambda part: part is None or isinstance(part, Mapping),
}
"""The parts of a trainer's state, and what each must be like."""


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the state is that of such an optimiser of such weights."""
    kind, ours, theirs = _kind(optimizer), _shapes(optimizer), state["shapes"]
    if state["kind"] != kind:
        fix = "make the trainer with the settings of the run that is resumed"
        rule = f"be that of an optimiser of the same kind, {kind}"
        refuse("state", rule, f"that of {state['kind']}", fix)
    if ours != [[list(shape) for shape in group] for group in theirs]:
        weights, others = sum(map(len, ours)), sum(map(len, theirs))
        rule = f"be that of {weights} weights in {len(ours)} group(s), all of the same shapes"
        fix = "another part of the model, or another model, was trained"
        refuse("state", rule, f"{others} in {len(theirs)}", fix)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from `optimizer_state`; the state stays the caller's own."""
    optimizer.load_state_dict(copy.deepcopy(state["state"]))


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the optimiser of torch, also inside of accelerate's."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the weights of each group."""
    return [[list(weight.shape) for weight in group["params"]] for group in optimizer.param_groups]
