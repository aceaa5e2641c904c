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

from trl.anatomy import agree, instead, try_out
from trl.core import logit_gradient, logprobs_and_entropy, token_statistics
from trl.kernels.gradients import Gradients
from trl.kernels.packed import packed_product

# Rows of the vocabulary, or of hidden states, that are worked on at a time: enough to keep the
# matrix products efficient, few enough that nothing of the size of all logits is needed.
_BLOCK_ROWS = 2048
_CACHED_ROWS = 1024
_LOGIT_BYTES = 2**26


class CentredWeights:
    """Centred weights of heads, kept for as long as the weights do not change.

    Args:
        packed: Whether `product` shall be by packed weights, see `trl.kernels.packed`.
    """

    def __init__(self, packed: bool = False) -> None:
        self._packed = packed
        self._products: dict[tuple[int, torch.dtype], Callable[[Tensor], Tensor]] = {}
        self._kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W − w̄ [V, d] in `dtype`, made the first time it is asked for."""
        key = (id(weight), dtype)
        if key not in self._kept:
            mean = weight.detach().mean(0, dtype=torch.float32)
            centred = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            _subtract(weight, mean, centred)
            self._kept[key] = weight, mean, centred
        return self._kept[key][2]

    def product(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return h·(W − w̄)ᵀ [..., V] in `dtype`, without a gradient."""
        if not self._packed:
            return F.linear(hidden.to(dtype), self.get(weight, dtype))
        key = (id(weight), dtype)
        if key not in self._products:
            centred = CentredWeights().get(weight, dtype)
            self._products[key] = packed_product(centred)
        return self._products[key](hidden)

    def refresh(self) -> None:
        """Make them again, in the same memory, after the weights have changed.

        The mean stays as it was: any row will do that is near all the others.
        """
        for weight, mean, centred in self._kept.values():
            if weight.requires_grad:
                _subtract(weight, mean, centred)


_centred: ContextVar[CentredWeights | None] = ContextVar("centred", default=None)


@contextmanager
def constant_weights(*, packed: bool = False, apart: bool = False) -> Iterator[CentredWeights]:
    """Promise that no weight changes inside: centred weights are made once and kept until the end.

    A cache without such a promise could not know when to forget: a fused optimiser updates the
    weights without moving on their version counter. Whoever changes them calls `refresh`.

    Args:
        packed: Whether products shall be by packed weights, see `trl.kernels.packed`.
        apart: Keep them apart from those of a promise that this one stands in.
    """
    if not apart and (already := _centred.get()) is not None:
        yield already
        return
    kept = CentredWeights(packed)
    token = _centred.set(kept)
    try:
        yield kept
    finally:
        _centred.reset(token)


@torch.no_grad()
def _subtract(weight: Tensor, mean: Tensor, out: Tensor) -> None:
    """Write W − w̄ [V, d] into `out`, in parts that stay in the cache."""
    for first in range(0, len(weight), _CACHED_ROWS):
        rows = slice(first, first + _CACHED_ROWS)
        torch.sub(weight[rows], mean, out=out[rows])


def centred_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W − w̄ [V, d] in `dtype`."""
    return (_centred.get() or CentredWeights()).get(weight, dtype)


class _HeadLogprobs(torch.autograd.Function):
    """Head and softmax in one: log-probs and entropies of labels, from hidden states.

    The logits exist for a block of rows at a time. Going backward they are computed again, unless
    all of them were few enough to keep; their gradient then takes their place in memory. The
    gradient of the weight goes straight to where it is collected, if it is (see `Gradients`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor,
        labels: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        entropy, mean_logit = torch.empty_like(logprobs), torch.empty_like(logprobs)
        blocks = _logit_blocks(hidden, factor)
        keep = len(blocks) == 1 and any(ctx.needs_input_grad[:3])
        logits = None
        for rows in blocks:
            logits = _affine(hidden[rows], factor, bias)
            logprobs[rows], entropy[rows], mean_logit[rows] = token_statistics(
                logits, labels[rows], temperature
            )
        ctx.save_for_backward(hidden, factor, bias, labels, mean_logit, logits if keep else None)
        ctx.temperature, ctx.blocks = temperature, blocks
        ctx.weight, ctx.gradients = weight, Gradients.collecting()
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, factor, bias, labels, mean_logit, kept = ctx.saved_tensors
        weight = ctx.weight
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            collected = ctx.gradients is not None and ctx.gradients.adds_to(weight)
            # What the first block is put into, or what all are added to.
            anew = torch.empty_like if ctx.blocks else torch.zeros_like
            grad_weight = weight.grad if collected else anew(weight)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias)
        for block, rows in enumerate(ctx.blocks):
            logits = _affine(hidden[rows], factor, bias) if kept is None else kept
            logit_gradient(
                logits,
                labels[rows],
                mean_logit[rows],
                None if grad_logprobs is None else grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                temperature=ctx.temperature,
                out=logits,
            )
            if grad_hidden is not None:
                torch.mm(logits, factor, out=grad_hidden[rows])
            if grad_weight is not None:
                _put_product(grad_weight, logits, hidden[rows], add=collected or block > 0)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        if grad_weight is weight.grad:
            grad_weight = None
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logit_blocks(hidden: Tensor, factor: Tensor) -> list[slice]:
    """Cut the rows [N, d] into blocks whose logits take limited memory."""
    size = max(1, _LOGIT_BYTES // (len(factor) * factor.element_size()))
    return [slice(row, row + size) for row in range(0, len(hidden), size)]


def _affine(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return h·Wᵀ + b [N, V] in the precision of `weight`."""
    return F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))


def _put_product(total: Tensor, logits: Tensor, hidden: Tensor, *, add: bool) -> None:
    """Put logitsᵀ·hidden [V, d] into `total`, or add it, a block of rows at a time."""
    for row in range(0, len(total), _BLOCK_ROWS):
        rows = slice(row, row + _BLOCK_ROWS)
        product = logits[:, rows].T @ hidden
        if add:
            total[rows].add_(product.float())  # `+=` would then copy the sum onto itself
        else:
            total[rows].copy_(product)


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
        if torch.is_grad_enabled() or _centred.get() is None:
            centred = centred_weight(head.weight, dtype)
            if torch.is_grad_enabled() and head.weight.requires_grad:
                # w̄ is a constant to the gradient. That is exact for a loss which does not see an
                # offset shared by all logits of a token: nothing flows through w̄.
                centred = centred + (head.weight - head.weight.detach()).to(dtype)
            logits = F.linear(hidden.to(dtype), centred)
        else:
            logits = _centred.get().product(hidden, head.weight, dtype)
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
        fits = hidden.shape[-1] == self.module.weight.shape[1]
        self.complete = fits and agree(self(hidden), logits)

    def logprobs(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies [N] of labels [N], given hidden states [N, d].

        The same numbers as `logprobs_and_entropy` of the logits, without all logits in memory.
        """
        weight = self.module.weight
        plain = type(self.module) is nn.Linear and self.softcap is None
        if not plain or weight.dtype != torch.float32:
            return logprobs_and_entropy(self(hidden), labels, temperature=temperature)
        if self.scale_in != 1.0:
            hidden = hidden * self.scale_in
        bias = self.module.bias
        if self.bias is not None:
            bias = self.bias.squeeze(0) if bias is None else bias + self.bias.squeeze(0)
        device, factor = hidden.device.type, weight.detach()
        if torch.is_autocast_enabled(device):
            factor = centred_weight(weight, torch.get_autocast_dtype(device))
            bias = None if bias is None else bias - bias.mean()
        with torch.autocast(device, enabled=False):
            return _HeadLogprobs.apply(
                hidden.to(factor.dtype), weight, bias, factor, labels, temperature / self.scale_out
            )

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
