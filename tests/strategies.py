"""Small random [B, R] tables for property tests."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Repeatable, and patient with a busy machine.
properties = settings(deadline=None, max_examples=50, derandomize=True, database=None)

numbers = st.floats(-5, 5, width=32)


@st.composite
def tables(draw: st.DrawFn, columns: int = 1) -> tuple[Tensor, ...]:
    """`columns` float64 tensors [B, R] and a mask that counts a token in every row."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    cells = st.lists(numbers, min_size=rows * length, max_size=rows * length)
    values = [torch.tensor(draw(cells)).double().view(rows, length) for _ in range(columns)]
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
    return *values, mask


def counted(values: Tensor, mask: Tensor) -> list[list[float]]:
    """The counted values of each row, as plain lists."""
    return [
        [x for x, counts in zip(row, row_mask, strict=True) if counts]
        for row, row_mask in zip(values.tolist(), mask.tolist(), strict=True)
    ]
