"""What a model has read of each row of a batch, kept from one turn of a conversation to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl.batch import pad_rows
from trl.rollout.room import RoomyLayer

State = list[tuple[Tensor, Tensor]]
"""Keys and values [H, n, d] of each layer, of the n tokens of one row, without padding."""


def keeps_all(cache: Any) -> bool:
    """Return whether a cache is nothing but keys and values, of every token and every layer.

    Others (windows, recurrent states) cannot be taken apart by rows of different lengths.
    """
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, RoomyLayer) and layer.get_seq_length() > 0
        for layer in cache.layers
    )


class Past:
    """A batch of rows that were read before, padded on the left.

    Args:
        states: Of B rows.

    Attributes:
        cache: For a model of transformers; its keys know their positions.
        mask: [B, P] bool, True on real tokens.
    """

    def __init__(self, states: Sequence[State]) -> None:
        lengths = [state[0][0].shape[1] for state in states]
        device = states[0][0][0].device
        self.mask = pad_rows([torch.ones(n, device=device) for n in lengths], left=True)[1]
        layers = [zip(*layer, strict=True) for layer in zip(*states, strict=True)]
        self.cache = DynamicCache([tuple(map(_padded, pair)) for pair in layers])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Return tensors [H, n_i, d] as one [B, H, P, d], padded on the left with 0."""
    heads, _, width = rows[0].shape
    longest = max(row.shape[1] for row in rows)
    padded = rows[0].new_zeros(len(rows), heads, longest, width)
    for into, row in zip(padded, rows, strict=True):
        into[:, longest - row.shape[1] :] = row
    return padded
