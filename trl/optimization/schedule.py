"""How the learning rate goes over the steps of a run."""

from __future__ import annotations

import math


def schedule_factor(
    step: int, *, total_steps: int, kind: str = "linear", warmup_steps: int = 0, final: float = 0.0
) -> float:
    """Factor on the learning rate of a step.

        step < warmup_steps:  (step + 1) / (warmup_steps + 1)
        after that, with x = min(1, (step − warmup_steps) / (total_steps − warmup_steps)):
            linear    final + (1 − final)·(1 − x)
            cosine    final + (1 − final)·½(1 + cos πx)
            constant  1

    Args:
        step: Steps already made: 0, 1, ….
        total_steps: Of the whole run; later ones get `final` (linear and cosine).
        kind: linear, cosine or constant.
        warmup_steps: Over which it rises.
        final: Share that is left at the end.
    """
    if not total_steps > warmup_steps:
        raise ValueError(f"`total_steps` must be > {warmup_steps}, got {total_steps}.")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    left = max(0.0, 1 - (step - warmup_steps) / (total_steps - warmup_steps))
    if kind == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return final + (1 - final) * left
