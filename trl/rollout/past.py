"""What a model has read of each row of a batch, kept from turn to turn of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl.batch import pad_rows
from trl.rollout.room import RoomyLayer, memory_for

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
    """What was read of B rows, padded on the left.

    Args:
        states: Of B rows.
        lengths: How many of their first tokens are taken; at least one is not 0.
        more: How many tokens follow at once: there is room for them, nothing is copied again.

    Attributes:
        cache: For a model of transformers; its keys know their positions.
        mask: [B, P] bool, True on real tokens.
    """

    def __init__(self, states: Sequence[State], lengths: Sequence[int], more: int) -> None:
        device = states[0][0][0].device
        self.mask = pad_rows([torch.ones(n, device=device) for n in lengths], left=True)[1]
        layers = [zip(*layer, strict=True) for layer in zip(*states, strict=True)]
        self.cache = DynamicCache()
        self.cache.layers = [
            RoomyLayer(*(_padded(x, lengths, more) for x in pair), max(lengths)) for pair in layers
        ]


def go_on(states: Sequence[State], lengths: Sequence[int]) -> tuple[Past | None, int]:
    """Return what need not be read again of rows of tokens, and how many tokens each is to read.

    All read as many: some a few tokens of theirs again, so that padding is on the left alone. A
    hole between what was read and what is new would count where a model counts columns.

    Args:
        states: Of the first tokens of B rows.
        lengths: B numbers of all tokens of the rows, each larger than that of its state.
    """
    columns = max(n - state[0][0].shape[1] for state, n in zip(states, lengths, strict=True))
    kept = [max(0, length - columns) for length in lengths]
    return (Past(states, kept, columns) if any(kept) else None), columns


def _padded(rows: Sequence[Tensor], lengths: Sequence[int], more: int) -> Tensor:
    """Return the first n_i columns of tensors [H, ·, d], padded on the left, and room behind."""
    longest = max(lengths)
    padded = memory_for(rows[0], len(rows), longest + more)
    for into, row, length in zip(padded, rows, lengths, strict=True):
        into[:, longest - length : longest] = row[:, :length]
    return padded
