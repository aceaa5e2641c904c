"""The language head: from hidden states to logits, also at low precision.

The logits of GPT-2 share a large offset (tens of units) that the softmax does not see, but that
uses up the 8 significant bits of bfloat16. So at low precision the head's mean row is subtracted
first: with w̄ = mean_v W_v,

    softmax(h·Wᵀ) = softmax(h·(W − w̄)ᵀ)        since h·w̄ is the same for every token v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.anatomy import instead, try_out

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
    if type(head) is not nn.Linear or not torch.is_autocast_enabled(device):
        return head(hidden)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        logits = _CentredLinear.apply(hidden, head.weight, centred_weight(head.weight, dtype))
        return logits if head.bias is None else logits + (head.bias - head.bias.mean()).to(dtype)


def _exact_logits(hidden: Tensor, head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits at the head's own precision: a tanh after it sees what centring changes."""
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.to(head.weight.dtype))


@contextmanager
def precise_head(plain: PreTrainedModel) -> Iterator[None]:
    """Under autocast, let the model's own forward pass use the head as training does."""
    if not torch.is_autocast_enabled(plain.device.type):
        yield
        return
    head = plain.get_output_embeddings()
    own = head.forward
    if getattr(plain.config, "final_logit_softcapping", None) is not None:
        precise = partial(_exact_logits, head=head, forward=own)
    elif type(head) is nn.Linear:
        precise = partial(language_logits, head=head)
    else:
        precise = own
    with instead(head, precise):
        yield


class LanguageHead:
    """How the family of a model makes logits from the decoder's last hidden states.

        z = s_out · (W·(s_in·h) + b)        then, in Gemma 2 and others, z ← c·tanh(z / c)

    Attributes:
        complete: Whether these are all the steps that the model takes: tried out on a few tokens.
    """

    def __init__(self, plain: PreTrainedModel) -> None:
        config = plain.config
        self.module = plain.get_output_embeddings()
        self.scale_in = 1.0
        if getattr(config, "scale_decoder_outputs", False):  # T5
            self.scale_in = config.d_model**-0.5
        self.scale_out = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale_out /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        self.bias = getattr(plain, "final_logits_bias", None)  # [1, V] BART
        self.softcap = getattr(config, "final_logit_softcapping", None)
        logits, hidden = try_out(plain)
        # A step that is missing changes all logits by much more than rounding does.
        rounding = 1e-5 if logits.dtype == torch.float32 else 2e-2
        gap = (self(hidden) - logits).abs().max() if hidden.shape[-1] == self.width else torch.inf
        self.complete = bool(gap <= rounding * logits.abs().max())

    @property
    def width(self) -> int:
        """The size d of a hidden state."""
        return self.module.weight.shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., d]; see `language_logits`."""
        if self.scale_in != 1.0:
            hidden = hidden * self.scale_in
        if self.softcap is None:
            logits = language_logits(hidden, self.module)
        else:
            logits = _exact_logits(hidden, self.module, self.module.forward)
        if self.bias is not None:
            logits = logits + self.bias.squeeze(0).to(logits.dtype)
        if self.scale_out != 1.0:
            logits = logits * self.scale_out
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
