"""The language head at low precision.

The logits of GPT-2 share a large offset (tens of units) that the softmax does not see, but that
uses up the 8 significant bits of bfloat16. So at low precision the head's mean row is subtracted
first: with w̄ = mean_v W_v,

    softmax(h·Wᵀ) = softmax(h·(W − w̄)ᵀ)        since h·w̄ is the same for every token v.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_centred: ContextVar[dict[tuple[int, torch.dtype], Tensor] | None] = ContextVar(
    "centred", default=None
)


@contextmanager
def constant_weights() -> Iterator[None]:
    """Promise that no weight changes inside: centred weights are made once and kept until the end.

    A cache without such a promise could not know when to forget: a fused optimiser updates the
    weights without moving on their version counter.
    """
    token = _centred.set({})
    try:
        yield
    finally:
        _centred.reset(token)


@torch.no_grad()
def centred_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W − w̄ [V, d] in `dtype`."""
    kept = _centred.get()
    if kept is not None and (id(weight), dtype) in kept:
        return kept[id(weight), dtype]
    full = weight.detach().float()
    centred = (full - full.mean(0)).to(dtype)
    if kept is not None:
        kept[id(weight), dtype] = centred
    return centred


class _CentredLinear(torch.autograd.Function):
    """h·(W − w̄)ᵀ whose gradient treats w̄ as a constant.

    Exact for any loss that does not see an offset shared by all logits of a token: the gradient
    of such a loss sums to zero over the vocabulary, so nothing flows through w̄.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, centred: Tensor) -> Tensor:
        hidden = hidden.to(centred.dtype)
        ctx.save_for_backward(hidden, centred)
        ctx.weight_dtype = weight.dtype
        return F.linear(hidden, centred)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, centred = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad @ centred
        if ctx.needs_input_grad[1]:
            flat_grad, flat_hidden = grad.flatten(0, -2), hidden.flatten(0, -2)
            grad_weight = (flat_grad.T @ flat_hidden).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def language_logits(hidden: Tensor, head: nn.Module) -> Tensor:
    """Return the logits [..., V] of hidden states [..., d].

    In float32 these are the head's own logits. Under autocast they are in the low precision and
    centred (see the module's text): equal to the head's up to a constant for each token.
    """
    device = hidden.device.type
    plain_linear = type(head) is nn.Linear and head.bias is None
    if not plain_linear or not torch.is_autocast_enabled(device):
        return head(hidden)
    dtype = torch.get_autocast_dtype(device)
    weight = head.weight
    with torch.autocast(device, enabled=False):
        return _CentredLinear.apply(hidden, weight, centred_weight(weight, dtype))
