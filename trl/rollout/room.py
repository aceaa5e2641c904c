"""A KV cache that grows in steps: few tokens copy what is there already.

Attention takes in whole grains of columns (see `trl.kernels.attention`). As the memory grows by
them, what attention reads lies in one piece; a product would copy anything else for each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from trl.kernels.attention import ATTENTION_GRAIN


def make_room(cache: Any) -> None:
    """Let the layers of a cache grow in steps, where they grow by copying.

    Rotary positions make keys float32, and with them the cache of both. Under autocast attention
    casts all of them for every token; here they are cast once.
    """
    layers = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.get_seq_length() > 0:
            keys, values = layer.keys, layer.values
            device = keys.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                keys, values = keys.to(dtype), values.to(dtype)
            layers[number] = RoomyLayer(keys, values)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, d], in memory for the next multiple of `ATTENTION_GRAIN` tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        length = keys.shape[-2]
        self._all_keys, self._all_values = (_with_room(x, length) for x in (keys, values))
        self._show(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states behind those that are there; return all of them."""
        first = self.get_seq_length()
        last = first + key_states.shape[-2]
        if last > self._all_keys.shape[-2]:
            self._all_keys = _with_room(self._all_keys, last)
            self._all_values = _with_room(self._all_values, last)
        self._all_keys[:, :, first:last] = key_states
        self._all_values[:, :, first:last] = value_states
        self._show(last)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows only, each as often as it is named."""
        self._all_keys = self._all_keys.index_select(0, beam_idx)
        self._all_values = self._all_values.index_select(0, beam_idx)
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def _with_room(states: Tensor, length: int) -> Tensor:
    """Return the states [B, H, T, d], and room behind them for whole grains of so many tokens."""
    rows, heads, before, width = states.shape
    roomy = states.new_zeros(rows, heads, length + -length % ATTENTION_GRAIN, width)
    roomy[:, :, :before] = states
    return roomy
