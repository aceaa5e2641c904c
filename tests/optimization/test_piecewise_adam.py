"""Adam in pieces over low-precision gradients makes the updates of torch's Adam."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from trl.compute import piecewise_adam
from trl.compute.piecewise_adam import LowGradient, can_update_in_pieces, update_in_pieces


def two_of_them(shapes):
    """Weights, and the same once more."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return [[nn.Parameter(weight.clone()) for weight in weights] for _ in range(2)]


def adam(weights, **settings):
    """Adam with two groups: the first has a learning rate of its own."""
    first = {"params": weights[:1], "lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.1}
    return torch.optim.Adam([first, {"params": weights[1:]}], lr=0.01, eps=1e-5, **settings)


# a power of two: multiplied by it, and divided by its inverse, gives the same bits
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("shapes", [[(6, 64), (64,), (128, 2)], [(5, 7), (3,), (11, 1)]])
def test_the_updates_and_the_state_are_those_of_torch(shapes, factor, monkeypatch):
    monkeypatch.setattr(piecewise_adam, "_PIECE", 64)
    mine, theirs = two_of_them(shapes)
    ours, plain = adam(mine, fused=True), adam(theirs, fused=True)
    copies = [weight.detach().bfloat16() for weight in mine]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        gradients = [torch.randn(w.shape, generator=generator).bfloat16() for w in mine]
        low = [0, 2] if step % 2 else [0]  # the others are in float32, and clipped already
        for index, gradient in enumerate(gradients):
            theirs[index].grad = gradient.float() * factor
            mine[index].grad = None if index in low else gradient.float() * factor
        ours.step()
        update_in_pieces(ours, [LowGradient(mine[i], gradients[i], copies[i]) for i in low], factor)
        plain.step()
        for index in low:
            assert torch.equal(copies[index], mine[index].bfloat16())
        for weight, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    left, right = ours.state_dict(), plain.state_dict()
    assert left["param_groups"] == right["param_groups"]
    torch.testing.assert_close(left["state"], right["state"], rtol=1e-6, atol=1e-7)


def test_a_weight_in_no_group_is_left_alone():
    weight, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    ours = torch.optim.Adam([weight], lr=0.1, fused=True)
    low = torch.ones(2, 2).bfloat16()
    update_in_pieces(ours, [LowGradient(other, low, other.detach().bfloat16())])
    assert torch.equal(other, torch.ones(2, 2))
    assert not ours.state


def test_only_for_a_plain_fused_adam_that_nobody_watches():
    weights = [nn.Parameter(torch.ones(2))]

    def fused(**settings):
        return torch.optim.Adam(weights, fused=True, **settings)

    assert can_update_in_pieces(fused())
    assert not can_update_in_pieces(torch.optim.Adam(weights))
    assert not can_update_in_pieces(fused(amsgrad=True))
    assert not can_update_in_pieces(fused(decoupled_weight_decay=True))
    assert not can_update_in_pieces(torch.optim.AdamW(weights, fused=True))
    assert not can_update_in_pieces(torch.optim.SGD(weights))
    for watch in ("register_step_pre_hook", "register_step_post_hook"):
        watched = fused()
        getattr(watched, watch)(lambda *_: None)
        assert not can_update_in_pieces(watched)
    for watch in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        hook = watch(lambda *_: None)
        assert not can_update_in_pieces(fused())
        hook.remove()
    assert can_update_in_pieces(fused())
