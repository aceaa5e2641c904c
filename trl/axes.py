"""How the fields of a `Rollout` stand in a batch, and how those of several parts are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.config.errors import refuse


def pad_and_cat(columns: Sequence[Tensor], *, left: bool = False) -> Tensor:
    """Join tensors [b, L] below each other, padded with 0 to the longest."""
    longest = max(column.shape[1] for column in columns)
    room = [longest - column.shape[1] for column in columns]
    return torch.cat(
        [F.pad(x, (more, 0) if left else (0, more)) for x, more in zip(columns, room, strict=True)]
    )


def _groups_apart(columns: Sequence[Tensor]) -> Tensor:
    """Join group numbers [b] so that no two parts share one."""
    joined, first = [], 0
    for column in columns:
        joined.append(column - column.min() + first)
        first = int(joined[-1].max()) + 1
    return torch.cat(joined)


def _one_after_another(columns: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(entry for column in columns for entry in column)


def _name_by_name(columns: Sequence[Mapping[str, tuple[Any, ...]]]) -> dict[str, tuple[Any, ...]]:
    if any(column.keys() != columns[0].keys() for column in columns):
        names = [sorted(column) for column in columns]
        refuse("parts", "have the same `columns`", str(names))
    return {name: _one_after_another([c[name] for c in columns]) for name in columns[0]}


@dataclass(frozen=True)
class Axes:
    """What a field of a `Rollout` is: how its value stands in the batch, and how parts are joined.

    Args:
        names: B: a row of the batch. Q: a column of the queries, padded on the left. R: one of the
            responses, padded on the right. T−1: of both together, without the last. No name at
            all: one value for the whole batch.
        join: From the values of several parts to the one of the whole. None: left out.
    """

    names: tuple[str, ...]
    join: Callable[[Any], Any] | None


QUERY_TOKENS = Axes(("B", "Q"), partial(pad_and_cat, left=True))
RESPONSE_TOKENS = Axes(("B", "R"), pad_and_cat)
ALL_BUT_THE_LAST = Axes(("B", "T−1", "d"), None)  # of columns that are other columns when joined
ROWS = Axes(("B",), torch.cat)
GROUPS = Axes(("B",), _groups_apart)
TUPLE = Axes(("B",), _one_after_another)
TUPLES = Axes(("B",), _name_by_name)
ONE_FOR_ALL = Axes((), lambda values: values[0])
IF_ALIKE = Axes((), None)  # one value for all, or none for all where parts differ in it
