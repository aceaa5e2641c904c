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
    """Let the layers of a cache grow in steps, where they grow by copying."""
    layers = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.get_seq_length() > 0:
            length = layer.get_seq_length()
            memory = (_with_room(states, length) for states in (layer.keys, layer.values))
            layers[number] = RoomyLayer(*memory, length)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, d], in memory for the next multiple of `ATTENTION_GRAIN` tokens.

    Args:
        keys: The memory, see `memory_for`.
        values: The same.
        length: T, how many of its columns are taken.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values = keys, values
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


def memory_for(states: Tensor, rows: int, length: int) -> Tensor:
    """Return memory [rows, H, ·, d] for states […, H, ·, d] of whole grains of so many tokens.

    Rotary positions make keys float32, and with them the cache of both. Under autocast attention
    casts all of them for every token; here they are cast once.
    """
    heads, _, width = states.shape[-3:]
    device = states.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else states.dtype
    columns = length + -length % ATTENTION_GRAIN
    return states.new_zeros(rows, heads, columns, width, dtype=dtype)


def _with_room(states: Tensor, length: int) -> Tensor:
    """Return the states [B, H, T, d], and room behind them for whole grains of so many tokens."""
    roomy = memory_for(states, len(states), length)
    roomy[:, :, : states.shape[2]] = states
    return roomy
