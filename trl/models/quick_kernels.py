"""Kernels that do the same on a CPU in less time than the ones transformers picks.

* Attention over short texts, and of a single token: the fused kernel works in tiles that are
  larger than what there is to do, above all going backward. Plain products are up to ten times
  faster.
* GPT-2's GELU: transformers writes out its formula, eight passes over the largest activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from trl.anatomy import ATTENTION_GRAIN, decoder, instead, try_out

SHORT_ATTENTION = "trl_short"
"""The name under which transformers knows `short_attention`."""

# Measured forward and backward, 2 cores: in bfloat16 plain products take 0.4 of the time of the
# fused kernel at 128 columns and 0.7 at 256 to 512, with the more memory the more columns; in
# float32 as long at 128 and 1.5 times as long at 512. For a single token they take a quarter of it
# in bfloat16, at any length of the cache.
_MOST_COLUMNS = {torch.bfloat16: 384, torch.float32: 64}


class QuickKernels:
    """The parts of a model that have a quicker equivalent, tried out when it is made."""

    def __init__(self, plain: PreTrainedModel) -> None:
        self._plain = plain
        on_cpu = plain.device.type == "cpu"
        self._gelus = [m for m in plain.modules() if on_cpu and type(m) is NewGELUActivation]
        self._config = decoder(plain).config
        self._attention = on_cpu and self._config._attn_implementation == "sdpa"
        if self._attention:
            expected, _ = try_out(plain)
            with self.in_use():
                found, _ = try_out(plain)
            rounding = 1e-5 if expected.dtype == torch.float32 else 2e-2
            gap = (found - expected).abs().max() / expected.abs().max()
            self._attention = bool(gap <= rounding)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the quick kernels in the passes inside, where they are quick."""
        if self._plain.device.type != "cpu":  # the model was moved after it was tried out
            yield
            return
        own = self._config._attn_implementation
        with ExitStack() as stack:
            for gelu in self._gelus:
                stack.enter_context(instead(gelu, partial(F.gelu, approximate="tanh")))
            try:
                if self._attention:
                    self._config._attn_implementation = SHORT_ATTENTION
                yield
            finally:
                self._config._attn_implementation = own


def short_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention by plain products if the text is short, else by the fused kernel.

    softmax(q·kᵀ·scaling + mask)·v, the softmax in float32.

    Args:
        module: The attention layer.
        query: [B, H, Q, d].
        key: [B, H or fewer, K, d]; each of fewer serves a group of heads.
        value: The same.
        attention_mask: [B, 1 or H, Q, K], True where a token is seen, or added to the products;
            None: what comes later is not seen.
        dropout: Of the fused kernel; there is none while training by PPO.
        scaling: None: d^−½.
        is_causal: None: the layer's.
        **more: What else the fused kernel understands.

    Returns:
        [B, Q, H, d], and None for the weights.
    """
    if torch.is_autocast_enabled(query.device.type):  # what rotary positions made float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    columns = query.shape[2]
    # A single token in float32, or anything out of the ordinary, is the fused kernel's.
    most = _MOST_COLUMNS.get(query.dtype, 0)
    quick = columns <= most and (columns > 1 or query.dtype == torch.bfloat16)
    unusual = any(more.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not quick or dropout or unusual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
    shape = query.shape
    groups = shape[1] // key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if groups > 1 and columns == 1 and one_mask:  # the heads of a group as rows of one product
        query = query.reshape(shape[0], key.shape[1], groups, shape[3])
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if columns == 1:
        key, value, attention_mask = _in_grains(key, value, attention_mask)
    products = query @ key.transpose(-1, -2)
    products = products * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and columns > 1:
            seen = torch.ones(columns, key.shape[2], dtype=torch.bool, device=query.device).tril()
            products = products.masked_fill(~seen, torch.finfo(products.dtype).min)
    elif attention_mask.dtype == torch.bool:
        products = products.masked_fill(~attention_mask, torch.finfo(products.dtype).min)
    else:
        products = products + attention_mask
    # The kernel computes in float32 and rounds once: what a softmax in float32 gives, rounded, with
    # a third of the memory for going backward.
    weights = products.softmax(-1).to(value.dtype)
    output = (weights @ value).reshape(*shape[:3], value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def _in_grains(
    key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in columns behind the cache, unseen: its length becomes one of whole grains.

    oneDNN prepares and keeps a product for each shape, which at every length would take longer
    than the product. Memory is behind a cache that has room, see `trl.rollout.room`.
    """
    length = key.shape[2]
    more = -length % ATTENTION_GRAIN
    if not more:
        return key, value, mask
    for states in (key, value):
        _, head, column, number = states.stride()
        width = states.shape[3]
        roomy = head >= (length + more) * width and (column, number) == (width, 1)
        if not roomy or states.storage_offset() % head:
            return key, value, mask
    longer = (
        states.as_strided(
            (*states.shape[:2], length + more, states.shape[3]),
            states.stride(),
            states.storage_offset(),
        )
        for states in (key, value)
    )
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=key.device)
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return *longer, F.pad(mask, (0, more), value=unseen)


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
