import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import numbers, properties, tables
from tests.test_core import close
from trl.optimization.bins import two_hot_loss

CENTRES = torch.tensor([0.0, 1.0, 2.0])


def test_two_hot_loss() -> None:
    # p = (1/2, 1/4, 1/4) for each token. Returns: .25 lies between bins 0 and 1, weights .75 and
    # .25: .75·ln 2 + .25·ln 4 = 1.25·ln 2; 1 is a bin, whatever it is counted to: ln 4; 5 and −3
    # are taken for the ends, 2 and 0: ln 4 and ln 2
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 4, 3).clone().requires_grad_()
    loss = two_hot_loss(logits, torch.tensor([[0.25, 1.0, 5.0, -3.0]]), CENTRES)
    close(loss.detach(), [[1.25 * math.log(2), math.log(4), math.log(4), math.log(2)]])
    loss.sum().backward()
    # d L / d z = p − weights
    assert logits.grad is not None
    expected = [[-0.25, 0.0, 0.25], [0.5, -0.75, 0.25], [0.5, 0.25, -0.75], [-0.5, 0.25, 0.25]]
    close(logits.grad, [expected])


def naive(logits: list[float], value: float, centres: list[float]) -> float:
    """Each weight is that of a hat as wide as the bins, and the sum is over all of them."""
    value = min(max(value, centres[0]), centres[-1])
    step = centres[1] - centres[0]
    total = sum(math.exp(z) for z in logits)
    hats = [max(0.0, 1 - abs(value - c) / step) for c in centres]
    return -sum(w * math.log(math.exp(z) / total) for w, z in zip(hats, logits, strict=True))


@properties
@given(tables(columns=4), numbers, st.integers(1, 4))
def test_two_hot_loss_against_a_loop(table: tuple[Tensor, ...], low: float, step: int) -> None:
    *columns, returns, _ = table
    logits = torch.stack(columns, -1)
    centres = low + step * torch.arange(3).double()
    found = two_hot_loss(logits, returns, centres)
    expected = [
        [naive(z, r, centres.tolist()) for z, r in zip(*row, strict=True)]
        for row in zip(logits.tolist(), returns.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))


@properties
@given(tables(columns=1), st.integers(2, 9))
def test_where_the_loss_is_least_the_expectation_is_the_return(
    table: tuple[Tensor, ...], bins: int
) -> None:
    returns, _ = table
    centres = torch.linspace(-6, 6, bins).double()
    logits = torch.zeros(*returns.shape, bins, dtype=torch.float64, requires_grad=True)
    two_hot_loss(logits, returns, centres).sum().backward()
    assert logits.grad is not None
    weights = logits.softmax(-1) - logits.grad  # the gradient is p − weights: zero where p is them
    assert bool((weights >= -1e-12).all())
    torch.testing.assert_close((weights * centres).sum(-1), returns)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for logits, centres in (
        (torch.zeros(1, 2, 3), CENTRES[:2]),
        (torch.zeros(1, 2, 1), CENTRES[:1]),
    ):
        with pytest.raises(ValueError, match=r"must have the shapes \[\.\.\., K\]"):
            two_hot_loss(logits, torch.zeros(1, 2), centres)
