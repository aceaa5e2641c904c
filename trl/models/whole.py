"""The weights of a sharded policy in one place, to be saved as any model is."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import Tensor, nn

from trl.anatomy import language_model
from trl.kernels.sharded import is_sharded, whole
from trl.models.adapters import base_weights


def add_whole_weights(policy: nn.Module, told: dict[str, Any]) -> bool:
    """Add the whole weights of a sharded policy to what `save_pretrained` is told, on the CPU.

    Every process must ask for them at once, and the first gets them: weight by weight, so that none
    holds more on its device than before and one of them. The base of an adapter is left out.

    Args:
        policy: If its weights are whole, or are told already, nothing is added.
        told: The arguments of `save_pretrained`.

    Returns:
        Whether this process is to write.
    """
    if "state_dict" in told or not any(map(is_sharded, policy.parameters())):
        return True
    weights = dict(policy.named_parameters(remove_duplicate=False))
    adapted = hasattr(getattr(policy, "pretrained_model", None), "get_base_model")
    base = base_weights(language_model(policy)) if adapted else ()
    left_out = {weight for _, weight in base if not weight.requires_grad}
    main = torch.distributed.get_rank() == 0
    kept: dict[nn.Parameter, Tensor] = {}  # tied weights are one tensor
    for weight in policy.parameters():
        if weight not in left_out:
            of_all = whole(weight.detach())
            kept |= {weight: of_all.cpu()} if main else {}
    state = policy.state_dict(keep_vars=True)
    others = "v_head." if adapted else ""  # those of the base stay where they are
    buffers = {n: x for n, x in state.items() if n not in weights and n.startswith(others)}
    named = {name: kept[weight] for name, weight in weights.items() if weight in kept}
    told |= {"state_dict": named | buffers, "is_main_process": main}
    return main
