import pytest
import torch
from torch import nn

from trl.core import logprobs_and_entropy
from trl.models.head import centred_weight, constant_weights, language_logits


def head_with_offset(offset: float) -> tuple[nn.Linear, torch.Tensor]:
    """A head whose logits share a large offset, as GPT-2's do, and hidden states for it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator)
    hidden[:, 0] = 1.0
    head = nn.Linear(64, 500, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(500, 64, generator=generator) * 0.3)
        head.weight[:, 0] += offset
    return head, hidden


def logprobs(hidden, head, labels, dtype=None):
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        return logprobs_and_entropy(language_logits(hidden, head), labels)[0]


def test_bf16_logprobs_do_not_suffer_from_the_offset():
    """|log p_bf16 − log p_fp32| with an offset of −80 stays what it is without one."""
    labels = torch.arange(40)
    gaps = {}
    for offset in (0.0, -80.0):
        head, hidden = head_with_offset(offset)
        exact = logprobs(hidden, head, labels)
        gaps[offset] = (logprobs(hidden, head, labels, torch.bfloat16) - exact).abs().mean().item()
        naive = head.weight.bfloat16() @ hidden.bfloat16().T
        naive_gap = (naive.T.float().log_softmax(-1)[labels, labels] - exact).abs().mean().item()
        if offset:
            assert naive_gap > 5 * gaps[offset]
    assert gaps[-80.0] < 1.5 * gaps[0.0] + 1e-3
    assert gaps[-80.0] < 0.03


def test_gradients_in_bf16_are_those_in_fp32_up_to_rounding():
    head, hidden = head_with_offset(-80.0)
    labels = torch.arange(40)
    grads = []
    for dtype in (None, torch.bfloat16):
        head.zero_grad()
        inputs = hidden.clone().requires_grad_()
        logprobs(inputs, head, labels, dtype).sum().backward()
        grads.append((inputs.grad, head.weight.grad.clone()))
    for exact, rounded in zip(*grads, strict=True):
        assert (
            torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999
        )
        assert rounded.dtype == torch.float32


def test_fp32_logits_are_the_heads_own():
    head, hidden = head_with_offset(-80.0)
    assert torch.equal(language_logits(hidden, head), head(hidden))


def test_a_head_with_bias_is_centred_too():
    head, hidden = head_with_offset(-80.0)
    biased = nn.Linear(64, 500)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.copy_(torch.randn(500) - 80.0)
    labels = torch.arange(40)
    exact = biased(hidden).log_softmax(-1)[labels, labels]
    assert (logprobs(hidden, biased, labels, torch.bfloat16) - exact).abs().mean() < 0.03


@pytest.mark.parametrize("fused", [True, False])
def test_the_centred_weight_follows_every_update(fused):
    """A fused optimiser does not move the weight's version counter on: no cache may rely on it."""
    head, hidden = head_with_offset(0.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.5, fused=fused)
    labels = torch.arange(40)
    before = logprobs(hidden, head, labels, torch.bfloat16)
    before.sum().backward()
    optimizer.step()
    after = logprobs(hidden, head, labels, torch.bfloat16)
    torch.testing.assert_close(after, logprobs(hidden, head, labels), rtol=0.02, atol=0.3)
    assert (after - before).abs().mean() > 1


def test_inside_constant_weights_it_is_made_once():
    head, _ = head_with_offset(0.0)
    with constant_weights():
        first = centred_weight(head.weight, torch.bfloat16)
        assert centred_weight(head.weight, torch.bfloat16) is first
    assert centred_weight(head.weight, torch.bfloat16) is not first
