"""A KV cache with room for what will be written: no step copies what is there already."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SPARE = 32
"""Columns behind the last token, so that attention may take in more than there is."""


def make_room(cache: Any, room: int) -> None:
    """Give the layers of a cache room for so many more tokens, where they grow by copying."""
    layers = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.get_seq_length() > 0:
            layers[number] = RoomyLayer(layer.keys, layer.values, room)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, d], in memory for T + `room` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values = (_with_room(x, room) for x in (keys, values))
        self._show(keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states behind those that are there; return all of them."""
        first = self.get_seq_length()
        last = first + key_states.shape[-2]
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


def _with_room(states: Tensor, room: int) -> Tensor:
    rows, heads, length, width = states.shape
    roomy = states.new_zeros(rows, heads, length + room + _SPARE, width)
    roomy[:, :, :length] = states
    return roomy
