"""What a resumed run needs of its trainer, as plain values and tensors on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimiser, and by what to tell whether it fits another."""
    return {
        "kind": _kind(optimizer),
        "shapes": _shapes(optimizer),
        "state": _on_cpu(optimizer.state_dict()),
    }


def check_state(state: Any, optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
    """Raise a ValueError unless it is the state of a trainer with such an optimiser.

    Args:
        state: What is to be loaded, of any type.
        optimizer: Of the trainer.
        scaled: Whether the trainer scales gradients, as at fp16.
    """
    if not isinstance(state, Mapping) or set(state) != set(_PARTS):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state` must be what `state_dict` returned, with {sorted(_PARTS)}, got {found}."
        )
    for name, check in _PARTS.items():
        try:
            sound = check(state[name])
        except (KeyError, TypeError, ValueError, RuntimeError):
            sound = False
        if not sound:
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_generator_state(value: Any) -> bool:
    torch.Generator().set_state(value.cpu())
    return True


_PARTS: dict[str, Callable[[Any], bool]] = {
    "steps_done": _is_count,
    "kl_controller": lambda part: _is_number(part["value"]) and part["value"] >= 0,
    "score_moments": lambda part: all(_is_number(part[k]) for k in ("count", "mean", "squares")),
    "shuffle": _is_generator_state,
    "optimizer": lambda part: set(part) == {"kind", "shapes", "state"},
    "scaler": lambda part: part is None or isinstance(part, Mapping),
}
"""The parts of a trainer's state, and what each must be like."""


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the state is that of such an optimiser of such weights."""
    if state["kind"] != _kind(optimizer):
        raise ValueError(
            f"`state` must be that of an optimiser of the same kind, {_kind(optimizer)}, got that "
            f"of {state['kind']}: make the trainer with the settings of the run that is resumed."
        )
    own, given = _shapes(optimizer), state["shapes"]
    counts = [[len(group) for group in groups] for groups in (own, given)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"`state` must be that of an optimiser of {sum(counts[0])} weights in {len(own)} "
            f"group(s), got {sum(counts[1])} in {len(given)}: another part of the model, or "
            "another model, was trained."
        )
    for group, (ours, theirs) in enumerate(zip(own, given, strict=True)):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != list(other):
                raise ValueError(
                    f"`state` must be that of an optimiser of the same weights, but weight {index} "
                    f"of group {group} has the shape {mine} here and {list(other)} there."
                )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from `optimizer_state`; the state stays the caller's own."""
    optimizer.load_state_dict(copy.deepcopy(state["state"]))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimiser of torch inside of accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(_inner(optimizer)).__name__


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the weights of each group."""
    return [[list(weight.shape) for weight in group["params"]] for group in optimizer.param_groups]


def _on_cpu(value: Any) -> Any:
    """Copy a tree of dicts, lists and tensors, its tensors to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(inner) for inner in value)
    return value
