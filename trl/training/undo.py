"""A copy of what a step of PPO changes: a step that fails in its midst is undone by it.

What was not made in full has no place in a checkpoint: weights after two of four updates are those
of no run. A copy of weights and of what the optimiser keeps takes three times their memory, so it
is made only where that is no matter. Without it a step can be taken back until its first update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trl.compute.budget import free_memory
from trl.ppo import PPOTrainer

SHARE = 0.1
"""Of the memory that is free, the most that the copy may take."""


def has_room(trainer: PPOTrainer) -> bool:
    """Tell whether the copy takes but little of the free memory, which it is asked for at first."""
    weights = _trained(trainer)
    free = torch.cuda.mem_get_info()[0] if weights[0].is_cuda else free_memory()
    return 3 * sum(weight.nbytes for weight in weights) <= SHARE * free


def copied(trainer: PPOTrainer, *, wholly: bool) -> Callable[[], bool]:
    """Copy what the next step changes.

    Args:
        trainer: Between two steps.
        wholly: Whether weights and what the optimiser keeps are copied too.

    Returns:
        What takes the step back, and tells whether it could.
    """
    weights, optimizer = _trained(trainer), trainer.optimizer
    versions, small = _versions(trainer), trainer.small_state()
    large = (
        tree_map_only(Tensor, torch.clone, (weights, optimizer.state_dict())) if wholly else None
    )

    @torch.no_grad()
    def undo() -> bool:
        if _versions(trainer) != versions:
            if large is None:
                return False
            for weight, before in zip(weights, large[0], strict=True):
                weight.copy_(before)
            optimizer.load_state_dict(large[1])
        trainer.load_small_state(small)
        return True

    return undo


def _trained(trainer: PPOTrainer) -> list[Tensor]:
    return [weight for weight in trainer.model.parameters() if weight.requires_grad]


def _versions(trainer: PPOTrainer) -> list[Any]:
    """Return what is another after any write to the weights or to what the optimiser keeps."""
    kept = tree_leaves([_trained(trainer), list(trainer.optimizer.state.values())])
    return [each._version if isinstance(each, Tensor) else each for each in kept]
