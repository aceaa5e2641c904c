import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import numbers, properties, tables
from tests.test_core import F, T, close
from trl.optimization.rewards import (
    RunningMoments,
    in_range,
    missing_eos_penalty,
    normalize_scores,
    token_rewards,
)

# --- rewards per token --------------------------------------------------------------------------


def test_token_rewards() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -9.0, -3.0]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -1.5, -1.0], [-1.0, -1.0, -5.0]])
    mask = torch.tensor([[T, T, F], [T, F, T]])
    rewards, non_score_rewards = token_rewards(
        logprobs, ref_logprobs, torch.tensor([2.0, -1.0]), mask, kl_coef=0.1
    )
    # k = 0.5, −0.5 and 0, 2; times −0.1; the score joins the last counted token
    close(non_score_rewards, [[-0.05, 0.05, 0.0], [0.0, 0.0, -0.2]])
    close(rewards, [[-0.05, 2.05, 0.0], [0.0, 0.0, -1.2]])
    assert not rewards.requires_grad


def test_token_rewards_with_another_estimator() -> None:
    arguments = (torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([1.0]))
    mask = torch.tensor([[T]])
    rewards, _ = token_rewards(*arguments, mask, kl_coef=0.4, kl_estimator="k2")
    close(rewards, [[0.95]])  # 1 − 0.4·½·0.25
    rewards, _ = token_rewards(*arguments, mask, kl_coef=0.4, kl_estimator="k3")
    close(rewards, [[0.9573877]])  # 1 − 0.4·0.1065307


@properties
@given(tables(2), st.lists(numbers, min_size=4, max_size=4), st.floats(0, 1))
def test_token_rewards_agree_with_a_plain_loop(
    table: tuple[Tensor, Tensor, Tensor], scores: list[float], kl_coef: float
) -> None:
    logprobs, ref_logprobs, mask = table
    rows, length = mask.shape
    expected = [[0.0] * length for _ in range(rows)]
    for b in range(rows):
        last = None
        for t in range(length):
            if mask[b, t]:
                expected[b][t] = -kl_coef * float(logprobs[b, t] - ref_logprobs[b, t])
                last = t
        assert last is not None
        expected[b][last] += scores[b]
    rewards, non_score_rewards = token_rewards(
        logprobs, ref_logprobs, torch.tensor(scores[:rows]), mask, kl_coef=kl_coef
    )
    close(rewards, expected, atol=1e-6)
    # what is not KL is the score, once per row
    close((rewards - non_score_rewards).sum(1), scores[:rows], atol=1e-6)
    assert not non_score_rewards[~mask].any()


def test_token_rewards_checks_its_input() -> None:
    logprobs = torch.zeros(2, 3)
    mask = torch.tensor([[T, T, F], [F, F, F]])
    with pytest.raises(ValueError, match=r"`mask` must count a token in every row.* rows \[1\]"):
        token_rewards(logprobs, logprobs, torch.zeros(2), mask, kl_coef=0.1)
    with pytest.raises(
        ValueError, match=r"one number per response, \[2\], or per token, \[2, 3\], got"
    ):
        token_rewards(logprobs, logprobs, torch.zeros(2, 2), mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="`mask`, `logprobs`, `ref_logprobs` must have the same"):
        token_rewards(logprobs, logprobs[:, :2], torch.zeros(2), mask, kl_coef=0.1)


def test_scores_of_tokens_are_rewards_where_they_stand() -> None:
    # −β·(log π − log π_ref) + s_t: −0.5·(−1 + 2) + 3 = 2.5 and −0.5·(−2 + 1) + 0 = 0.5
    logprobs, ref = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -1.0, -9.0]])
    scores, mask = torch.tensor([[3.0, 0.0, 7.0]]), torch.tensor([[T, T, F]])
    rewards, non_score = token_rewards(logprobs, ref, scores, mask, kl_coef=0.5)
    close(rewards[0], [2.5, 0.5, 0.0])
    close(non_score[0], [-0.5, 0.5, 0.0])


# --- penalties ----------------------------------------------------------------------------------


def test_missing_eos_penalty() -> None:
    scores, ended = torch.tensor([3.0, 2.0]), torch.tensor([T, F])
    close(missing_eos_penalty(scores, ended, 1.0, replace=True), [3.0, -1.0])
    close(missing_eos_penalty(scores, ended, 1.5, replace=False), [3.0, 0.5])
    with pytest.raises(ValueError, match=r"`penalty` must be >= 0 .* got -1.0"):
        missing_eos_penalty(scores, ended, -1.0, replace=True)


# --- moments ------------------------------------------------------------------------------------


def test_running_moments() -> None:
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.std) == (0, 0.0, 0.0)
    moments.update(torch.tensor([1.0, 2.0, 3.0]))
    assert (moments.count, moments.mean, moments.std) == (3, 2.0, 1.0)
    moments.update(torch.tensor([5.0]))
    # mean 11/4; squares 3.0625 + 0.5625 + 0.0625 + 5.0625 = 8.75; √(8.75 / 3) = 1.7078251
    assert (moments.count, moments.mean) == (4, 2.75)
    assert moments.std == pytest.approx(1.7078251)


def test_running_moments_do_not_cancel() -> None:
    moments = RunningMoments()
    for score in (1e8 + 1, 1e8 + 2, 1e8 + 3):
        moments.update(torch.tensor([score], dtype=torch.float64))
    assert moments.std == pytest.approx(1.0)


@properties
@given(st.lists(st.lists(numbers, max_size=5), max_size=5))
def test_running_moments_do_not_depend_on_the_batches(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    flat = [score for batch in batches for score in batch]
    assert moments.count == len(flat)
    if flat:
        assert moments.mean == pytest.approx(statistics.fmean(flat), abs=1e-9)
    if len(flat) > 1:
        assert moments.std == pytest.approx(statistics.stdev(flat), abs=1e-6)
    resumed = RunningMoments()
    resumed.load_state_dict(moments.state_dict())
    for each in (moments, resumed):
        each.update(torch.tensor([4.0, -3.0]))
    assert (resumed.count, resumed.mean, resumed.std) == (moments.count, moments.mean, moments.std)


def test_running_moments_reject_a_score_that_is_not_finite() -> None:
    moments = RunningMoments()
    with pytest.raises(ValueError, match="`scores` must be finite"):
        moments.update(torch.tensor([1.0, math.nan]))
    assert moments.count == 0


# --- normalisation ------------------------------------------------------------------------------


def test_normalize_scores() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0, 8.0]))  # mean 4, squares 9 + 1 + 16, std √13 = 3.6055513
    scores = torch.tensor([8.0, 3.0])

    def normalized(**settings: float) -> Tensor:
        return normalize_scores(scores, moments, **settings)  # type: ignore[arg-type]

    close(normalized(), [8.0, 3.0])
    close(normalized(center=True), [4.0, -1.0])
    close(normalized(scale=True), [2.2188008, 0.8320503])  # 8, 3 / 3.6055513
    close(normalized(center=True, scale=True), [1.1094004, -0.2773501])  # 4, −1 / 3.6055513
    close(normalized(center=True, scale=True, clip=0.5), [0.5, -0.2773501])
    close(normalized(clip=5.0), [5.0, 3.0])
    assert moments.count == 3


@pytest.mark.parametrize("scores", [[2.5], [2.5, 2.5, 2.5]])
def test_scaling_without_a_spread_is_harmless(scores: list[float]) -> None:
    """Fault 15 of 2020: score scaling crashed, on a single score among others."""
    moments = RunningMoments()
    moments.update(torch.tensor(scores))
    close(normalize_scores(torch.tensor(scores), moments, scale=True), scores)
    centered = normalize_scores(torch.tensor(scores), moments, center=True, scale=True)
    close(centered, [0.0] * len(scores))


def test_normalize_scores_checks_clip() -> None:
    with pytest.raises(ValueError, match="`clip` must be > 0 or None, got 0"):
        normalize_scores(torch.zeros(2), RunningMoments(), clip=0)


def test_moments_need_no_float64_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none: what is made of scores in float64 is made on the CPU."""

    class OnGPU(torch.Tensor):
        """A tensor that is on a device without float64 until `.cpu()` is called."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.double, torch.Tensor.to):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            found = super().__torch_function__(function, types, args, kwargs or {})
            on_cpu = function is torch.Tensor.cpu
            return found.as_subclass(torch.Tensor) if on_cpu else found

    scores = torch.tensor([1.0, 2.0, 6.0]).as_subclass(OnGPU)
    with pytest.raises(TypeError, match="MPS"):
        scores.double()
    moments = RunningMoments()
    moments.update(scores)
    assert moments.mean == 3.0


@pytest.mark.parametrize(
    "change", [{"count": -1}, {"mean": math.nan}, {"squares": -1.0}, {"squares": math.inf}]
)
def test_moments_that_are_none_are_not_loaded(change: dict[str, float]) -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    good = moments.state_dict()
    with pytest.raises(ValueError, match="`state` must be finite, with `count` and `squares` >= 0"):
        moments.load_state_dict(good | change)
    assert moments.state_dict() == good


def test_scores_in_range_by_hand() -> None:
    # 2·(s − 1)/4 − 1, cut off at both ends
    close(in_range(torch.tensor([1, 2, 5, 9, -3]), 1, 5), [-1.0, -0.5, 1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match="`low` must be < `high`, got 1 and 1"):
        in_range(torch.zeros(1), 1, 1)


@properties
@given(st.lists(numbers, min_size=1), numbers, st.floats(0.1, 5))
def test_scores_in_range_keep_their_order(scores: list[float], low: float, width: float) -> None:
    found = in_range(torch.tensor(scores).double(), low, low + width)
    expected = [min(max(2 * (s - low) / width - 1, -1), 1) for s in scores]
    close(found, expected, atol=1e-6)
    assert found.abs().max() <= 1
