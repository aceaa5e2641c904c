"""Products by a weight that is laid out once for the CPU's bfloat16 units, for sampling.

A product of few rows, as in writing a token for each of 32 texts, takes as long to bring the weight
into the layout that these units read as to multiply by it. While sampling no weight changes, so
that can be done beforehand. The products are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 32
"""The layout is chosen for products of about so many rows; others work too."""


def can_pack(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Return whether this build of torch has such products, and they come out right."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    rows, weight = (torch.arange(64.0).view(2, 32) / 64).to(dtype), torch.eye(32, dtype=dtype)
    try:
        return torch.equal(packed_product(weight)(rows), rows)
    except (AttributeError, RuntimeError):  # a build without oneDNN, or other operators
        return False


def packed_product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return h·Wᵀ + b as a function of h [..., d], for a weight [n, d] that will not change."""
    operators, dtype = torch.ops.mkldnn, weight.dtype
    packed = operators._reorder_linear_weight(weight.contiguous(), _ROWS)

    def product(hidden: Tensor) -> Tensor:
        if hidden.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("packed weights give no gradient: train outside of `sampling()`.")
        return operators._linear_pointwise(hidden.to(dtype), packed, bias, "none", [], "")

    return product
