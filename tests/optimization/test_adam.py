import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from tests.test_core import close
from trl.optimization.adam import TensorFlowAdam, gradient_norm


def steps(
    optimizer_class: type[torch.optim.Optimizer], gradients: list[list[float]], **settings: float
) -> torch.Tensor:
    """Where a parameter that starts at 0 is after the given gradients, in float64."""
    parameter = torch.zeros(len(gradients[0]), dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_class([parameter], **settings)  # type: ignore[arg-type]
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.detach()


def test_two_steps_by_hand() -> None:
    # β = (0.5, 0.75), lr 0.1, ε 0.5; g = 1, then 3
    # t=1: m = 0.5, v = 0.25; α = 0.1·√(1 − 0.75)/(1 − 0.5) = 0.1;
    #      θ = −0.1·0.5/(0.5 + 0.5) = −0.05
    # t=2: m = 0.25 + 1.5 = 1.75, v = 0.1875 + 2.25 = 2.4375;
    #      α = 0.1·√(1 − 0.5625)/(1 − 0.25) = 0.0881917;
    #      θ = −0.05 − 0.0881917·1.75/(1.5612495 + 0.5) = −0.05 − 0.0748747
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.5}
    close(steps(TensorFlowAdam, [[1.0]], **settings), [-0.05])  # type: ignore[arg-type]
    close(steps(TensorFlowAdam, [[1.0], [3.0]], **settings), [-0.1248747])  # type: ignore[arg-type]


def test_epsilon_is_not_bias_corrected() -> None:
    # g = 1e-4: v̂ = 1e-8 either way. torch: g/(√v̂ + ε) = 1e-4/(1e-4 + 1e-5) = 0.9090909
    # TF: √v = 1e-4·√0.001 = 3.1622777e-6, α·m = √0.001·1e-4, / (3.1622777e-6 + 1e-5) = 0.2402531
    close(steps(torch.optim.Adam, [[1e-4]], lr=1.0, eps=1e-5), [-0.9090909])
    close(steps(TensorFlowAdam, [[1e-4]], lr=1.0, eps=1e-5), [-0.2402531])


gradients = st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=6)


@properties
@given(gradients, st.sampled_from([1e-5, 0.1]))
def test_steps_agree_with_a_plain_loop(gradients: list[list[float]], eps: float) -> None:
    expected = []
    for column in zip(*gradients, strict=True):
        theta = m = v = 0.0
        for t, g in enumerate(column, start=1):
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            rate = 0.05 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            theta -= rate * m / (math.sqrt(v) + eps)
        expected.append(theta)
    close(steps(TensorFlowAdam, gradients, lr=0.05, eps=eps), expected)


def test_it_is_adam_but_for_epsilon() -> None:
    gradients = [[1.0, -2.0], [0.5, 3.0], [-4.0, 1.0]]
    ours = steps(TensorFlowAdam, gradients, lr=0.05, eps=1e-14)
    close(ours, steps(torch.optim.Adam, gradients, lr=0.05, eps=1e-14), rtol=1e-9)


def test_it_resumes() -> None:
    whole = steps(TensorFlowAdam, [[1.0], [2.0], [-3.0]], lr=0.1)
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    first = TensorFlowAdam([parameter], lr=0.1)
    for gradient in (1.0, 2.0):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        first.step()
    second = TensorFlowAdam([parameter], lr=0.7)
    second.load_state_dict(first.state_dict())
    parameter.grad = torch.tensor([-3.0], dtype=torch.float64)
    second.step()
    assert torch.equal(parameter.detach(), whole)


def test_closure_and_missing_gradients() -> None:
    used, unused = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = TensorFlowAdam([used, unused], lr=0.1)

    def closure() -> float:
        loss = (3 * used).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert used.item() < 1
    assert unused.item() == 1


def test_the_norm_of_gradients_by_hand():
    gradients = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor(12.0), torch.zeros(3)]
    assert gradient_norm(gradients) == 13.0
    assert gradient_norm([]) == 0.0
    assert math.isnan(gradient_norm([torch.tensor([1.0, math.nan])]))
    assert gradient_norm([torch.tensor([1.0, math.inf])]) == math.inf


def test_the_norm_of_a_large_gradient_is_not_short():
    large = torch.randn(20_000, 500, generator=torch.Generator().manual_seed(0))
    half = large.to(torch.bfloat16)
    assert gradient_norm([large]) == pytest.approx(large.double().norm().item(), rel=1e-6)
    assert gradient_norm([half]) == pytest.approx(half.double().norm().item(), rel=1e-6)
