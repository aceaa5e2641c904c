import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies import counted, properties, tables
from trl import core

NAN = math.nan
T, F = True, False


def close(actual: Tensor | float, expected: object, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Compare values; the expected ones are plain numbers."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


# --- masked mean and variance -------------------------------------------------------------------

VALUES = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, 6.0]])
MASK = torch.tensor([[T, T, F], [T, F, T]])


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (None, 3.25),  # (1 + 2 + 4 + 6) / 4
        (0, [2.5, 2.0, 6.0]),  # (1 + 4) / 2, 2 / 1, 6 / 1
        (1, [1.5, 5.0]),  # (1 + 2) / 2, (4 + 6) / 2
        (-1, [1.5, 5.0]),
    ],
)
def test_masked_mean(axis: int | None, expected: object) -> None:
    close(core.masked_mean(VALUES, MASK, axis), expected)


def test_masked_var() -> None:
    # deviations from 3.25: −2.25, −1.25, 0.75, 2.75; squares 5.0625 + 1.5625 + 0.5625 + 7.5625
    # = 14.75; / 3 = 4.9166667, / 4 = 3.6875
    close(core.masked_var(VALUES, MASK), 4.9166667)
    close(core.masked_var(VALUES, MASK, unbiased=False), 3.6875)


def test_variance_of_one_counted_element_is_zero() -> None:
    mask = torch.tensor([[F, T, F], [F, F, F]])
    close(core.masked_var(VALUES, mask), 0.0)
    close(core.masked_var(VALUES, mask, unbiased=False), 0.0)


@pytest.mark.parametrize("function", [core.masked_mean, core.masked_var, core.masked_whiten])
def test_an_empty_mask_is_an_error(function: object) -> None:
    with pytest.raises(ValueError, match="`mask` must count at least one element"):
        function(VALUES, torch.zeros_like(MASK))  # type: ignore[operator]


def test_an_empty_slice_is_an_error() -> None:
    with pytest.raises(ValueError, match="`mask` must count an element in every slice"):
        core.masked_mean(VALUES, torch.tensor([[T, T, F], [F, F, F]]), axis=1)


@pytest.mark.parametrize("function", [core.masked_mean, core.masked_var, core.masked_whiten])
def test_a_mask_of_numbers_is_an_error(function: object) -> None:
    with pytest.raises(ValueError, match=r"`mask` must be a bool tensor .* got torch.float32"):
        function(VALUES, MASK.float())  # type: ignore[operator]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`mask`, `values` must have the same shape, .*\[2, 2\]"):
        core.masked_mean(VALUES, MASK[:, :2])


def test_half_precision_is_summed_in_fp32() -> None:
    # in bf16, 256 + 1 = 256: a bf16 sum of ones sticks there
    ones = torch.ones(1, 1000, dtype=torch.bfloat16)
    mean = core.masked_mean(ones * 3, torch.ones(1, 1000, dtype=torch.bool))
    assert mean.dtype == torch.float32
    close(mean, 3.0)


@properties
@given(tables())
def test_masked_statistics_agree_with_the_standard_library(table: tuple[Tensor, Tensor]) -> None:
    values, mask = table
    rows = counted(values, mask)
    flat = [x for row in rows for x in row]
    close(core.masked_mean(values, mask), statistics.fmean(flat))
    close(core.masked_mean(values, mask, 1), [statistics.fmean(row) for row in rows])
    close(core.masked_var(values, mask, unbiased=False), statistics.pvariance(flat))
    assume(len(flat) > 1)
    close(core.masked_var(values, mask), statistics.variance(flat))


@properties
@given(tables())
def test_what_is_masked_never_matters(table: tuple[Tensor, Tensor]) -> None:
    values, mask = table
    garbage = torch.where(mask, values, NAN)
    for function in (core.masked_mean, core.masked_var, core.masked_whiten):
        assert torch.equal(function(values, mask), function(garbage, mask))  # type: ignore[operator]


# --- whitening ----------------------------------------------------------------------------------

# Mean 1.6, deviations −0.4 … 0.4, squares 2·(0.16 + 0.09 + 0.04 + 0.01) = 0.6.
FIXTURE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_whiten_with_the_biased_variance_of_tensorflow() -> None:
    # √(0.6 / 9) = 0.2581989; 1.6 − 0.4 / 0.2581989 = 0.0508067, 1.6 − 0.3 / … , 1.6 − 0.2 / …
    whitened = core.whiten(FIXTURE, shift_mean=False, unbiased=False)
    close(whitened[0], [0.0508067, 0.4381050, 0.8254033])


def test_whiten_with_the_unbiased_variance_of_the_2020_trl() -> None:
    # √(0.6 / 8) = 0.2738613; 1.6 − 0.4 / 0.2738613 = 0.1394065, …
    whitened = core.whiten(FIXTURE, shift_mean=False)
    close(whitened[0], [0.1394065, 0.5045549, 0.8697033])


def test_whiten_shifts_the_mean_to_zero_by_default() -> None:
    # −0.4 / 0.2738613 = −1.4605935, −0.3 / … = −1.0954451, −0.2 / … = −0.7302967
    close(core.whiten(FIXTURE)[0], [-1.4605935, -1.0954451, -0.7302967])


def test_masked_whiten_is_zero_outside_the_mask() -> None:
    # counted 1, 2, 4, 6: mean 3.25, √4.9166667 = 2.2173558;
    # −2.25, −1.25, 0.75, 2.75 over that: −1.0147221, −0.5637345, 0.3382407, 1.2402159
    expected = [[-1.0147221, -0.5637345, 0.0], [0.3382407, 0.0, 1.2402159]]
    close(core.masked_whiten(VALUES, MASK), expected)
    # … + 3.25
    kept = [[2.2352779, 2.6862655, 0.0], [3.5882407, 0.0, 4.4902159]]
    close(core.masked_whiten(VALUES, MASK, shift_mean=False), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 10.1, 12345.67, 1e-30, 3e30])
@pytest.mark.parametrize("size", [1, 2, 3, 12, 1000])
def test_equal_values_are_whitened_to_exactly_0(size: int, value: float, dtype: torch.dtype):
    """Rounding leaves something of x − μ, which the division by √1e-8 would blow up."""
    values = torch.full((2, size), value, dtype=dtype)
    values[1, size // 2 :] = math.nan  # outside of the mask
    mask = ~values.isnan()
    assert (core.masked_whiten(values, mask) == 0).all()
    kept = core.masked_whiten(values, mask, shift_mean=False)
    assert torch.equal(kept, values.nan_to_num(0.0))


def test_values_that_differ_in_the_last_bit_are_not_taken_for_equal() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-23])
    assert core.whiten(values).abs().max() > 0


def test_whiten_one_token() -> None:
    close(core.whiten(torch.tensor([[3.0]])), [[0.0]])
    close(core.whiten(torch.tensor([[3.0]]), shift_mean=False), [[3.0]])


@properties
@given(tables())
def test_whitened_values_have_mean_0_and_variance_1(table: tuple[Tensor, Tensor]) -> None:
    values, mask = table
    flat = [x for row in counted(values, mask) for x in row]
    assume(statistics.pvariance(flat) > 1e-2)
    for unbiased in (True, False):
        whitened = core.masked_whiten(values, mask, unbiased=unbiased)
        white = [x for row in counted(whitened, mask) for x in row]
        variance = statistics.variance if unbiased else statistics.pvariance
        assert statistics.fmean(white) == pytest.approx(0, abs=1e-9)
        assert variance(white) == pytest.approx(1, rel=1e-5)
        kept = core.masked_whiten(values, mask, shift_mean=False, unbiased=unbiased)
        shift = [x for row in counted(kept - whitened, mask) for x in row]
        assert shift == pytest.approx([statistics.fmean(flat)] * len(flat), abs=1e-9)
        assert not whitened[~mask].any()
        assert not kept[~mask].any()


def test_clip_by_value() -> None:
    x = torch.tensor([-3.0, 0.5, 3.0])
    low, high = torch.tensor([-1.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 2.0])
    close(core.clip_by_value(x, low, high), [-1.0, 1.0, 2.0])
    close(core.clip_by_value(x, -1, 1), [-1.0, 0.5, 1.0])


# --- log-probabilities and entropy --------------------------------------------------------------

LN3 = math.log(3)


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_logprobs_and_entropy_by_hand(offset: float) -> None:
    # softmax(0, ln 3) = (1/4, 3/4): ln ¼ = −1.3862944, ln ¾ = −0.2876821
    # H = ¼·1.3862944 + ¾·0.2876821 = 0.5623351
    logits = torch.tensor([[0.0, LN3], [0.0, LN3]]) + offset
    logprobs, entropy = core.logprobs_and_entropy(logits, torch.tensor([0, 1]))
    close(logprobs, [-1.3862944, -0.2876821], rtol=2e-5)
    close(entropy, [0.5623351, 0.5623351], rtol=2e-5)
    close(core.logprobs_from_logits(logits, torch.tensor([1, 0])), [-0.2876821, -1.3862944], 2e-5)
    close(core.entropy_from_logits(logits), [0.5623351, 0.5623351], rtol=2e-5)


def test_temperature_divides_the_logits() -> None:
    # (0, 2·ln 3) / 2 = (0, ln 3); (0, ½·ln 3) / ½ too
    for temperature in (2.0, 0.5):
        logits = torch.tensor([0.0, LN3]) * temperature
        logprob, entropy = core.logprobs_and_entropy(
            logits, torch.tensor(1), temperature=temperature
        )
        close(logprob, -0.2876821)
        close(entropy, 0.5623351)


def test_a_forbidden_token_has_probability_zero() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]] * 2, requires_grad=True)
    logprobs, entropy = core.logprobs_and_entropy(logits, torch.tensor([0, 1]))
    close(logprobs.detach(), [-0.6931472, -math.inf])  # ½ and 0
    close(entropy.detach(), [0.6931472, 0.6931472])
    (logprobs[0] + entropy.sum()).backward()
    # row 0: 1 − ½, 0, −½; the entropy is at its maximum
    assert logits.grad is not None
    close(logits.grad, [[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]])


def naive_logprob_and_entropy(
    logits: list[float], label: int, temperature: float
) -> tuple[float, float]:
    weights = [math.exp(z / temperature) for z in logits]
    p = [weight / sum(weights) for weight in weights]
    return math.log(p[label]), -sum(q * math.log(q) for q in p)


@properties
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    vocabulary=st.integers(1, 9),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    block_rows=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_any_shape_in_any_blocks_agrees_with_a_plain_loop(
    shape: list[int], vocabulary: int, temperature: float, block_rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(vocabulary, shape, generator=generator)
    with blocks_of(block_rows * vocabulary * 4):
        logprobs, entropy = core.logprobs_and_entropy(logits, labels, temperature=temperature)
    assert logprobs.shape == entropy.shape == labels.shape
    expected = [
        naive_logprob_and_entropy(row, label, temperature)
        for row, label in zip(
            logits.reshape(-1, vocabulary).tolist(), labels.flatten().tolist(), strict=True
        )
    ]
    close(logprobs.flatten(), [logprob for logprob, _ in expected])
    close(entropy.flatten(), [entropy for _, entropy in expected])


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_CPU_BLOCK_BYTES_PER_THREAD", size)
        yield


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_gradients_of_both_outputs(temperature: float, block_rows: int) -> None:
    # [:, :-1] is how logits are shifted, and makes them non-contiguous
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 3))

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return core.logprobs_and_entropy(logits[:, :-1], labels, temperature=temperature)

    with blocks_of(block_rows * 5 * 4):
        assert torch.autograd.gradcheck(both, logits)
        assert torch.autograd.gradcheck(lambda z: both(z)[0], logits)
        assert torch.autograd.gradcheck(lambda z: both(z)[1], logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_gpt2_like_logits(dtype: torch.dtype) -> None:
    """Values and gradients as exact as the logits allow, in spite of their common offset."""
    labels = torch.randint(1000, (8,))
    logits = (torch.randn(8, 1000) * 3 - 100).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    exact_logprobs = exact.log_softmax(-1)
    exact_entropy = -(exact_logprobs.exp() * exact_logprobs).sum(-1)
    exact_chosen = exact_logprobs[torch.arange(8), labels]
    (exact_chosen.sum() + exact_entropy.sum()).backward()

    logprobs, entropy = core.logprobs_and_entropy(logits, labels)
    (logprobs.sum() + entropy.sum()).backward()

    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    close(logprobs.detach(), exact_chosen.detach(), atol=1e-5)
    close(entropy.detach(), exact_entropy.detach(), atol=1e-5)
    close(logits.grad, exact.grad, rtol=torch.finfo(dtype).eps + 1e-4, atol=2e-6)


class Allocations(TorchDispatchMode):
    """Records (elements, dtype) of every new tensor; views and in-place results are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
        known = {x.untyped_storage().data_ptr() for x in inputs}
        result = func(*args, **(kwargs or {}))
        for out in filter(_is_tensor, torch.utils._pytree.tree_leaves(result)):
            if out.untyped_storage().data_ptr() not in known:
                self.made.append((out.numel(), out.dtype))
        return result


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, shifted: bool, temperature: float) -> None:
    """No tensor of the logits' size going forward; going backward one, the gradient."""
    whole = torch.randn(4, 17 if shifted else 16, 512, dtype=dtype, requires_grad=True)
    logits = (whole[:, :-1] if shifted else whole).detach().requires_grad_()
    labels = torch.randint(512, (4, 16))
    weights = torch.randn(4, 16)
    with blocks_of(4 * 512 * 4):  # 4 of 64 rows
        with Allocations() as forward:
            logprobs, entropy = core.logprobs_and_entropy(logits, labels, temperature=temperature)
        with Allocations() as backward:
            torch.autograd.grad((logprobs, entropy), logits, (weights, weights))
    assert max(numel for numel, _ in forward.made) == 4 * 512
    assert [made for made in backward.made if made[0] > 4 * 512] == [(64 * 512, dtype)]


def test_memory_check_sees_an_ordinary_log_softmax() -> None:
    """The instrument of `test_memory` works: it catches what that test forbids."""
    logits = torch.randn(64, 512)
    with Allocations() as plain:
        logits.log_softmax(-1)
    assert (64 * 512, torch.float32) in plain.made


def test_an_unused_entropy_costs_no_gradient() -> None:
    logits = torch.randn(6, 10, requires_grad=True)
    logprobs, _ = core.logprobs_and_entropy(logits, torch.zeros(6, dtype=torch.long))
    with Allocations() as alone:
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    # d log p_0 / dz = 1[v = 0] − p: every row sums to 0
    close(gradient.sum(-1), [0.0] * 6, atol=1e-6)
    assert sum(numel == 60 for numel, _ in alone.made) == 2  # one block of probabilities, result


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 7]), r"`labels` must be token ids in 0 … 6, got 0 … 7"),
        (torch.tensor([-100, 1]), r"`labels` must be token ids in 0 … 6, got -100 … 1"),
        (torch.tensor([1]), r"`labels` must have the shape of `logits` without its last"),
        (torch.tensor([[0], [1]]), r"`labels` must have the shape of `logits` without its last"),
    ],
)
def test_labels_are_checked(labels: Tensor, message: str) -> None:
    for function in (core.logprobs_from_logits, core.logprobs_and_entropy):
        with pytest.raises(ValueError, match=message):
            function(torch.randn(2, 7), labels)  # type: ignore[operator]


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be > 0"):
        core.logprobs_and_entropy(torch.randn(2, 7), torch.tensor([0, 1]), temperature=temperature)


def test_no_rows_at_all() -> None:
    logprobs, entropy = core.logprobs_and_entropy(
        torch.empty(0, 3, 7), torch.empty(0, 3, dtype=torch.long)
    )
    assert logprobs.shape == entropy.shape == (0, 3)


# --- KL estimates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected", "gradient"),
    [
        # k = −1 − (−1.5) = 0.5; e^−0.5 = 0.6065307
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),  # ½·0.25; derivative k
        ("k3", 0.1065307, 0.3934693),  # 0.6065307 − 1 + 0.5; derivative 1 − e^−k
        ("k3+", 0.1065307, 0.5),  # the value of k3, the derivative of k2
    ],
)
def test_kl_estimate(kind: core.KLKind, expected: float, gradient: float) -> None:
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    estimate = core.kl_estimate(logprobs, torch.tensor([[-1.5]]), kind)
    estimate.sum().backward()
    close(estimate.detach(), [[expected]], rtol=1e-5)
    assert logprobs.grad is not None
    close(logprobs.grad, [[gradient]], rtol=1e-5)


def test_kl_estimate_is_exact_for_tiny_differences() -> None:
    # k3 of k = 1e-4 is k²/2 − k³/6 + … = 4.9998e-9; e^−k − 1 + k in fp32 would give 0 or 6e-8
    k3 = core.kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    close(k3, [4.9998e-9], rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["k3", "k3+"])
def test_k3_of_a_token_that_was_given_up_is_finite(kind: core.KLKind) -> None:
    """e^99 overflows float32; k is held at −20: e^20 − 1 − 20."""
    logprobs = torch.tensor([-100.0], requires_grad=True)
    k3 = core.kl_estimate(logprobs, torch.tensor([-1.0]), kind)
    close(k3.detach(), [485165174.4], rtol=1e-6)
    k3.sum().backward()
    assert logprobs.grad.isfinite().all()
    # Where nothing overflows, nothing is bounded.
    close(
        core.kl_estimate(torch.tensor([-11.0]), torch.tensor([-1.0]), kind), [22015.4657948], 0.01
    )


def test_where_the_bounds_cross_the_lower_one_wins() -> None:
    """As torch.max(torch.min(x, high), low) of 2020 has it."""
    x = torch.tensor([-3.0, 0.0, 3.0])
    assert core.clip_by_value(x, 1.0, -1.0).tolist() == [1.0, 1.0, 1.0]
    assert core.clip_by_value(x, torch.tensor([0.0, 1.0, 1.0]), 2.0).tolist() == [0.0, 1.0, 2.0]


def test_kl_estimate_rejects_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="`kind` must be 'k1', 'k2', 'k3' or 'k3\\+', got 'kl'"):
        core.kl_estimate(torch.zeros(1), torch.zeros(1), "kl")  # type: ignore[arg-type]


@properties
@given(st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), min_size=2, max_size=5))
def test_k1_and_k3_have_the_kl_as_expectation(weights: list[tuple[float, float]]) -> None:
    p_total, q_total = sum(w for w, _ in weights), sum(w for _, w in weights)
    p, q = [w / p_total for w, _ in weights], [w / q_total for _, w in weights]
    kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    logp, logq = torch.tensor(p).double().log(), torch.tensor(q).double().log()
    for kind in ("k1", "k3"):
        expectation = (torch.tensor(p).double() * core.kl_estimate(logp, logq, kind)).sum()
        assert float(expectation) == pytest.approx(kl, abs=1e-6)
    assert (core.kl_estimate(logp, logq, "k3") >= 0).all()


# --- token masks --------------------------------------------------------------------------------


def test_position_ids() -> None:
    mask = torch.tensor([[F, F, T, T, T], [T, T, T, F, F]])
    assert core.position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0, [T, T, F, F, F]),
        (1, [T, T, F, F, F]),  # the token at `start` itself ends the row
        (2, [T, T, T, T, F]),
        (4, [T, T, T, T, T]),
    ],
)
def test_mask_after(start: int, expected: list[bool]) -> None:
    tokens = torch.tensor([[5, 0, 7, 0, 1]])
    assert core.mask_after(tokens, 0, start=start).tolist() == [expected]


@properties
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(0, 6),
)
def test_mask_after_agrees_with_a_plain_loop(tokens: list[list[int]], start: int) -> None:
    expected = []
    for row in tokens:
        open_, mask = True, []
        for index, token in enumerate(row):
            mask.append(open_)
            if token == 0 and index >= start:
                open_ = False
        expected.append(mask)
    assert core.mask_after(torch.tensor(tokens), 0, start=start).tolist() == expected


# --- dictionaries and batches -------------------------------------------------------------------


def test_flatten_dict() -> None:
    nested = {"ppo": {"loss": {"policy": 1}, "returns": 2}, "time": 3}
    assert core.flatten_dict(nested) == {"ppo/loss/policy": 1, "ppo/returns": 2, "time": 3}
    assert core.flatten_dict({"a/b": {"c": 1}}, sep=".") == {"a/b.c": 1}
    with pytest.raises(ValueError, match="must not contain '/', got 'a/b'"):
        core.flatten_dict({"a/b": 1})
    with pytest.raises(ValueError, match="got 'b/c'"):
        core.flatten_dict({"a": {"b/c": 1}})


def test_stack_dicts() -> None:
    first = {"x": torch.tensor([[1, 2], [3, 4]]), "y": torch.tensor(5)}
    second = {"y": torch.tensor(6), "x": torch.tensor([[7, 8], [9, 0]]), "z": torch.tensor(1)}
    stacked = core.stack_dicts([first, second])
    assert {key: value.tolist() for key, value in stacked.items()} == {
        "x": [[1, 2, 3, 4], [7, 8, 9, 0]],
        "y": [[5], [6]],
    }


def test_add_suffix() -> None:
    assert core.add_suffix({"a": 1, "b": 2}, "_mean") == {"a_mean": 1, "b_mean": 2}


def test_average_torch_dicts() -> None:
    average = core.average_torch_dicts(
        [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([2.0, 6.0])}]
    )
    close(average["x"], [1.5, 4.0])


def test_stats_to_np() -> None:
    stats = core.stats_to_np(
        {
            "scalar": torch.tensor(1.5, requires_grad=True),
            "vector": torch.tensor([1.0, 2.0]),
            "half": torch.tensor([0.5], dtype=torch.bfloat16),
            "int": 3,
            "numpy": np.float32(0.25),
            "array": np.array([1, 2]),
            "text": "good film",
        }
    )
    assert (stats["scalar"], stats["int"], stats["numpy"]) == (1.5, 3.0, 0.25)
    assert all(type(stats[key]) is float for key in ("scalar", "int", "numpy"))
    assert all(isinstance(stats[key], np.ndarray) for key in ("vector", "half", "array"))
    assert stats["vector"].tolist() == [1.0, 2.0]
    assert stats["half"].tolist() == [0.5]
    assert stats["text"] == "good film"


def test_pad_to_size() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert core.pad_to_size(tokens, 4).tolist() == [[1, 2, 50256, 50256], [3, 4, 50256, 50256]]
    assert core.pad_to_size(tokens, 3, dim=0, padding=0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert core.pad_to_size(tokens, 2) is tokens
    with pytest.raises(ValueError, match="`size` must be >= 2, the size at hand, got 1"):
        core.pad_to_size(tokens, 1)


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_build_bert_batch_from_txt() -> None:
    ids, mask = core.build_bert_batch_from_txt(["a", "bcd"], Letters(), "cpu")
    assert ids.tolist() == [[97, 0, 0], [98, 99, 100]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_length_sampler_includes_the_minimum_and_excludes_the_maximum() -> None:
    sampler = core.LengthSampler(2, 5)
    assert {sampler() for _ in range(200)} == {2, 3, 4}
    torch.manual_seed(7)
    first = [sampler() for _ in range(20)]
    torch.manual_seed(7)
    assert first == [sampler() for _ in range(20)]


@pytest.mark.parametrize(("low", "high"), [(3, 3), (4, 3), (-1, 3)])
def test_length_sampler_checks_its_range(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="`min_value` must be >= 0 and < `max_value`"):
        core.LengthSampler(low, high)


@pytest.mark.parametrize("bad", [0.5, math.nan, 2, -1, 1 + 1j])
def test_positions_are_counted_by_masks_alone(bad: complex) -> None:
    with pytest.raises(ValueError, match=r"`attention_mask` must be bool, or 0 and 1, got "):
        core.position_ids_from_mask(torch.tensor([[0, 1, bad]]))
    for dtype in (torch.bool, torch.int64, torch.float32):
        positions = core.position_ids_from_mask(torch.tensor([[0, 1, 1]]).to(dtype))
        assert positions.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("bad", [[0.5, 1.0], [math.nan, 1.0], [1.0, 1j], [1, 0], [True, False]])
def test_what_is_no_mask_is_named(bad: list[complex]) -> None:
    values, mask = torch.ones(2), bad if bad[0] is True else torch.tensor(bad)
    for function in (core.masked_mean, core.masked_var, core.masked_whiten):
        with pytest.raises(ValueError, match=r"`mask` must be a bool tensor .* use mask.bool\(\)"):
            function(values, mask)


def test_complex_numbers_are_not_cut_in_half() -> None:
    values, mask = torch.tensor([1 + 1j, 2]), torch.tensor([T, T])
    for function in (core.masked_mean, core.masked_var, core.masked_whiten):
        with pytest.raises(ValueError, match="must hold real numbers, got torch.complex64"):
            function(values, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_changes_nothing(dtype: torch.dtype) -> None:
    values, logits = torch.linspace(-1, 2, 6).view(2, 3), torch.linspace(-3, 4, 24).view(2, 3, 4)
    mask, labels = torch.tensor([[T, T, F], [T, T, T]]), torch.tensor([[0, 1, 2], [3, 0, 1]])

    def everything() -> list[Tensor]:
        return [
            core.masked_mean(values, mask),
            core.masked_mean(labels, mask, 1),
            core.masked_whiten(values, mask),
            core.masked_whiten(labels, mask, False),
            core.whiten(values.half()),
            core.clip_by_value(values, -0.1, 0.3),
            *core.logprobs_and_entropy(logits, labels, temperature=0.7),
            *(core.kl_estimate(values, 2 * values, kind) for kind in ("k1", "k2", "k3", "k3+")),
            core.position_ids_from_mask(mask),
            core.average_torch_dicts([{"a": labels}, {"a": values}])["a"],
        ]

    expected = everything()
    torch.set_default_dtype(dtype)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
