"""Kernels that do the same on a CPU in less time than the ones transformers picks.

* Attention over short texts, and of a single token: see `trl.kernels.attention`.
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

from trl.anatomy import agree, decoder, instead, try_out
from trl.kernels.attention import attention, suits
from trl.kernels.sharded import device_of

SHORT_ATTENTION = "trl_short"
"""The name under which transformers knows `short_attention`."""


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
            self._attention = agree(found, expected)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the quick kernels in the passes inside, where they are quick."""
        with ExitStack() as stack:
            if (
                device_of(next(self._plain.parameters())).type == "cpu"
            ):  # or the model was moved after it was tried out
                for gelu in self._gelus:
                    stack.enter_context(instead(gelu, partial(F.gelu, approximate="tanh")))
                if self._attention:
                    before = self._config._attn_implementation
                    stack.callback(setattr, self._config, "_attn_implementation", before)
                    self._config._attn_implementation = SHORT_ATTENTION
            yield


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
    """Attention by plain products where these are quick, else by the fused kernel.

    Args:
        module: The attention layer.
        query: [B, H, Q, d]; for this and the next four see `trl.kernels.attention.attention`.
        key: [B, H or fewer, K, d].
        value: The same.
        attention_mask: [B, 1 or H, Q, K].
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
    unusual = any(more.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if dropout or unusual or not suits(query):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return attention(query, key, value, attention_mask, scaling, causal), None


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
