import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import counted, properties, tables
from tests.test_core import NAN, F, T, close
from trl.config import PPOConfig
from trl.optimization import losses

# --- policy -------------------------------------------------------------------------------------

RATIOS = torch.tensor([1.5, 0.5, 0.5, 1.5, 1.1])
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])


def test_clipped_policy_loss() -> None:
    # −max(…) by hand, ratio clipped to 0.8 … 1.2:
    # −min(1.5, 1.2) = −1.2 (clipped); −min(0.5, 0.8) = −0.5; max(0.5, 0.8) = 0.8 (clipped);
    # max(1.5, 1.2) = 1.5; −2·1.1 = −2.2
    logprobs = RATIOS.log().view(1, 5).requires_grad_()
    loss, ratio, clipped = losses.clipped_policy_loss(
        logprobs, torch.zeros(1, 5), ADVANTAGES.view(1, 5), cliprange=0.2
    )
    close(loss.detach(), [[-1.2, -0.5, 0.8, 1.5, -2.2]])
    close(ratio.detach(), [[1.5, 0.5, 0.5, 1.5, 1.1]])
    assert clipped.tolist() == [[T, F, T, F, F]]
    loss.sum().backward()
    # d(−Âρ)/d log π = −Âρ where not clipped, 0 where clipped
    assert logprobs.grad is not None
    close(logprobs.grad, [[0.0, -0.5, 0.0, 1.5, -2.2]])


def test_clip_higher() -> None:
    # ratio clipped to 0.8 … 1.28
    loss, clipped = losses.clipped_surrogate(
        torch.tensor([1.25, 1.5, 0.5]),
        torch.tensor([1.0, 1.0, -1.0]),
        cliprange=0.2,
        cliprange_high=0.28,
    )
    close(loss, [-1.25, -1.28, 0.8])
    assert clipped.tolist() == [F, T, T]


def test_dual_clip() -> None:
    # Â = −1: max(5, 1.2) = 5, at most 3; max(2, 1.2) = 2. Â = 1: −min(5, 1.2), untouched
    ratio = torch.tensor([5.0, 2.0, 5.0], requires_grad=True)
    loss, clipped = losses.clipped_surrogate(
        ratio, torch.tensor([-1.0, -1.0, 1.0]), cliprange=0.2, dual_clip=3.0
    )
    close(loss.detach(), [3.0, 2.0, -1.2])
    assert clipped.tolist() == [T, F, T]
    loss.sum().backward()
    assert ratio.grad is not None
    close(ratio.grad, [0.0, 1.0, 0.0])


def test_a_broken_token_does_not_overflow() -> None:
    logprobs = torch.tensor([[0.0, -200.0]], requires_grad=True)
    loss, ratio, _ = losses.clipped_policy_loss(
        logprobs, torch.tensor([[-200.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), cliprange=0.2
    )
    close(ratio.detach(), [[math.exp(20), math.exp(-20)]])
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


@properties
@given(
    tables(3),
    st.sampled_from([0.1, 0.2, 1.0]),
    st.sampled_from([None, 0.1, 0.5]),
    st.sampled_from([None, 1.5, 3.0]),
)
def test_clipped_policy_loss_agrees_with_a_plain_loop(
    table: tuple[Tensor, Tensor, Tensor, Tensor],
    low: float,
    high: float | None,
    dual: float | None,
) -> None:
    logprobs, old_logprobs, advantages, _ = table
    loss, ratio, clipped = losses.clipped_policy_loss(
        logprobs, old_logprobs, advantages, cliprange=low, cliprange_high=high, dual_clip=dual
    )
    cells = zip(
        logprobs.flatten().tolist(),
        old_logprobs.flatten().tolist(),
        advantages.flatten().tolist(),
        strict=True,
    )
    expected, ratios, flags = [], [], []
    for new, old, advantage in cells:
        rho = math.exp(new - old)
        bounded = min(max(rho, 1 - low), 1 + (low if high is None else high))
        objective = min(advantage * rho, advantage * bounded)
        flag = advantage * bounded < advantage * rho
        if dual is not None and advantage < 0 and objective < dual * advantage:
            objective, flag = dual * advantage, True
        expected.append(-objective)
        ratios.append(rho)
        flags.append(flag)
    close(loss.flatten(), expected)
    close(ratio.flatten(), ratios)
    assert clipped.flatten().tolist() == flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cliprange": -0.2}, "`cliprange` must be > 0 and <= 1, got -0.2"),
        ({"cliprange": 1.5}, "`cliprange` must be > 0 and <= 1, got 1.5"),
        ({"cliprange": 0.2, "cliprange_high": 0}, "`cliprange_high` must be > 0 or None, got 0"),
        ({"cliprange": 0.2, "dual_clip": 1}, "`dual_clip` must be > 1 or None, got 1"),
    ],
)
def test_clip_ranges_are_checked(settings: dict[str, float], message: str) -> None:
    table = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        losses.clipped_policy_loss(table, table, table, **settings)  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    table, wide = torch.zeros(1, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="`logprobs`, `old_logprobs` must have the same shape"):
        losses.clipped_policy_loss(table, wide, table, cliprange=0.2)
    with pytest.raises(ValueError, match="`ratio`, `advantages` must have the same shape"):
        losses.clipped_policy_loss(table, table, wide, cliprange=0.2)
    with pytest.raises(ValueError, match="`logprobs`, `advantages` must have the same shape"):
        losses.cispo_loss(table, table, wide, cliprange=0.2)
    with pytest.raises(ValueError, match="`values`, `old_values`, `returns` must have the same"):
        losses.clipped_value_loss(table, table, wide, cliprange_value=0.2)


def test_sequence_ratio_is_the_geometric_mean() -> None:
    logprobs = torch.tensor([[math.log(2), math.log(8), NAN]], requires_grad=True)
    mask = torch.tensor([[T, T, F]])
    ratio = losses.sequence_ratio(logprobs, torch.zeros(1, 3), mask)
    close(ratio.detach(), [4.0])  # √(2·8)
    ratio.sum().backward()
    assert logprobs.grad is not None
    close(logprobs.grad[:, :2], [[2.0, 2.0]])  # 4 · ½


@properties
@given(tables(2))
def test_sequence_ratio_agrees_with_a_plain_loop(table: tuple[Tensor, Tensor, Tensor]) -> None:
    logprobs, old_logprobs, mask = table
    expected = [
        math.prod(math.exp(x) for x in row) ** (1 / len(row))
        for row in counted(logprobs - old_logprobs, mask)
    ]
    close(losses.sequence_ratio(logprobs, old_logprobs, mask), expected)


def test_gspo_clips_responses_and_spreads_their_gradient() -> None:
    # log ratios .2 .4: s = e^.3 = 1.34986 is clipped to 1.2, and has no gradient; log ratios
    # .1 −.3: s = e^−.1 = .904837 is not, −Â·s = .904837, and so is its gradient
    logprobs = torch.tensor([[0.2, 0.4, 9.0], [0.1, -0.3, 9.0]], requires_grad=True)
    mask = torch.tensor([[T, T, F]] * 2)
    advantages = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
    loss, ratio, clipped = losses.gspo_loss(
        logprobs, torch.zeros(2, 3), advantages, mask, cliprange=0.2
    )
    close(loss[mask].detach(), [-1.2, -1.2, 0.904837, 0.904837])
    close(ratio[mask].detach(), [1.349859, 1.349859, 0.904837, 0.904837])
    assert clipped[mask].tolist() == [T, T, F, F]
    losses.sequence_mean(loss, mask).backward()
    assert logprobs.grad is not None
    # mean over 2 tokens, and over 2 responses
    close(logprobs.grad, [[0.0, 0.0, 0.0], [0.2262093, 0.2262093, 0.0]])


def test_gspo_of_tokens_is_gspo_if_a_response_has_one_advantage() -> None:
    logprobs = torch.tensor([[0.3, -0.1, 0.0], [0.2, 0.05, 0.1]], requires_grad=True)
    old, mask = torch.zeros(2, 3), torch.tensor([[T, T, F], [T, T, T]])
    advantages = torch.tensor([0.7, -1.3])
    found = losses.gspo_loss(logprobs, old, advantages[:, None].expand(2, 3), mask, cliprange=0.05)[
        0
    ]
    (mine,) = torch.autograd.grad(losses.sequence_mean(found, mask), logprobs)
    ratio = losses.sequence_ratio(logprobs, old, mask)
    whole = losses.clipped_surrogate(ratio, advantages, cliprange=0.05)[0]
    (theirs,) = torch.autograd.grad(whole.mean(), logprobs)
    close(mine, theirs)
    close(losses.sequence_mean(found, mask).detach(), whole.mean().detach())


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    # old = log π − log ρ, so that log π = −2 everywhere
    logprobs = torch.full((1, 3), -2.0, requires_grad=True)
    old_logprobs = -2.0 - torch.tensor([[1.5, 0.5, 1.1]]).log()
    loss, ratio, clipped = losses.cispo_loss(
        logprobs, old_logprobs, torch.tensor([[1.0, 3.0, -1.0]]), cliprange=0.2, cliprange_high=0.3
    )
    # weights 1.3, 0.8, 1.1; −w·Â·(−2) = 2.6, 4.8, −2.2
    close(loss.detach(), [[2.6, 4.8, -2.2]])
    close(ratio.detach(), [[1.5, 0.5, 1.1]])
    assert clipped.tolist() == [[T, T, F]]
    loss.sum().backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [[-1.3, -2.4, 1.1]])  # −w·Â


def test_cispo_without_a_lower_bound() -> None:
    loss, _, clipped = losses.cispo_loss(
        torch.tensor([-1.0]), torch.tensor([-1.0 - math.log(0.01)]), torch.ones(1), cliprange=1.0
    )
    close(loss, [0.01])
    assert not clipped.any()


def test_good_responses_by_hand() -> None:
    # 3 + 1 + 2 tokens; rows 0 and 2 are good, with 5 of them: each weighs 6/5
    mask = torch.tensor([[T, T, T], [T, F, F], [T, T, F]])
    config = PPOConfig(positive_coef=0.1, positive_above=0.5)
    weights = losses.positive_weights(torch.tensor([1.0, 0.5, 2.0]), mask, config)
    assert weights is not None
    close(weights, [[1.2, 1.2, 1.2], [0.0, 0.0, 0.0], [1.2, 1.2, 0.0]])
    surprise = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0], [4.0, 5.0, 9.0]])
    close(losses.token_mean(weights * surprise, mask), 15 / 5)
    # another process has as many tokens, and 1 good one
    of_all = losses.positive_weights(
        torch.tensor([1.0, 0.5, 2.0]), mask, config, lambda n: n + torch.tensor([6, 1])
    )
    assert of_all is not None
    close(of_all[0], [2.0, 2.0, 2.0])
    none = losses.positive_weights(torch.zeros(3), mask, config)
    assert none is not None
    assert not none.any()
    assert losses.positive_weights(torch.ones(3), mask, PPOConfig()) is None


@properties
@given(tables(1), st.sampled_from([-1.0, 0.0, 2.0]))
def test_good_responses_agree_with_a_plain_loop(table: tuple[Tensor, Tensor], above: float) -> None:
    surprise, mask = table
    scores = surprise[:, 0]
    config = PPOConfig(algorithm="vapo", positive_above=above)
    weights = losses.positive_weights(scores, mask, config)
    assert weights is not None
    good = [
        x
        for score, row in zip(scores.tolist(), counted(surprise, mask), strict=True)
        for x in row
        if score > above
    ]
    expected = sum(good) / len(good) if good else 0.0
    close(losses.token_mean(weights * surprise, mask), expected, atol=1e-6)


# --- value --------------------------------------------------------------------------------------


def test_clipped_value_loss() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0]], requires_grad=True)
    loss, clipped = losses.clipped_value_loss(
        values,
        torch.tensor([[0.0, 0.9, 2.0]]),
        torch.tensor([[2.0, 2.0, 2.0]]),
        cliprange_value=0.2,
    )
    # clip(1, −0.2 … 0.2) = 0.2: ½·max(1, 1.8²) = 1.62 (clipped); clip(1, 0.7 … 1.1) = 1: ½;
    # clip(1, 1.8 … 2.2) = 1.8: ½·max(1, 0.2²) = ½
    close(loss.detach(), [[1.62, 0.5, 0.5]])
    assert clipped.tolist() == [[T, F, F]]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad[0, 0] == 0
    assert values.grad[0, 2] == -1  # V − R; where neither is clipped, the two halves of a tie
    with pytest.raises(ValueError, match="`cliprange_value` must be > 0 or None, got 0"):
        losses.clipped_value_loss(values, values, values, cliprange_value=0)


@properties
@given(tables(3), st.sampled_from([0.1, 0.2, 2.0, None]))
def test_clipped_value_loss_agrees_with_a_plain_loop(
    table: tuple[Tensor, Tensor, Tensor, Tensor], cliprange: float | None
) -> None:
    values, old_values, returns, _ = table
    loss, clipped = losses.clipped_value_loss(
        values, old_values, returns, cliprange_value=cliprange
    )
    expected, flags = [], []
    cells = zip(*(x.flatten().tolist() for x in (values, old_values, returns)), strict=True)
    for new, old, target in cells:
        far = math.inf if cliprange is None else cliprange
        near = new if cliprange is None else old + min(max(new - old, -far), far)
        expected.append(max((new - target) ** 2, (near - target) ** 2) / 2)
        flags.append((near - target) ** 2 > (new - target) ** 2 + 1e-9)
    close(loss.flatten(), expected)
    # `near` is computed in another order: a difference of rounding is no clip
    assert all(clipped.flatten()[i] for i, flag in enumerate(flags) if flag)
    assert (loss >= (values - returns).square() / 2 - 1e-9).all()


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, NAN]])
    mask = torch.tensor([[T, T, T, F]])
    # R − V = 0, 0, 1: variance ⅓; variance of R 1
    values = torch.tensor([[1.0, 2.0, 2.0, 5.0]])
    close(losses.explained_variance(values, returns, mask), 0.6666667)
    close(losses.explained_variance(returns + 10, returns, mask), 1.0)
    close(losses.explained_variance(torch.full((1, 4), 7.0), returns, mask), 0.0)
    # R − V = 2R − 4 has variance 4
    close(losses.explained_variance(4 - returns, returns, mask), -3.0)
    close(losses.explained_variance(values, torch.ones(1, 4), mask), 0.0)


@properties
@given(tables(2))
def test_explained_variance_agrees_with_the_standard_library(
    table: tuple[Tensor, Tensor, Tensor],
) -> None:
    values, returns, mask = table
    flat = [x for row in counted(returns, mask) for x in row]
    errors = [x for row in counted(returns - values, mask) for x in row]
    assume(statistics.pvariance(flat) > 1e-2)
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance(flat)
    close(losses.explained_variance(values, returns, mask), expected)


# --- aggregation --------------------------------------------------------------------------------

X = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]])
MASK = torch.tensor([[T, T, F], [T, F, F]])


def test_aggregations() -> None:
    close(losses.token_mean(X, MASK), 2.0)  # (1 + 2 + 3) / 3
    close(losses.sequence_mean(X, MASK), 2.25)  # (1.5 + 3) / 2
    close(losses.sequence_sum(X, MASK), 3.0)  # (3 + 3) / 2
    close(losses.constant_norm(X, MASK, length=4), 0.75)  # (3/4 + 3/4) / 2


def test_aggregations_with_the_count_of_the_whole_batch() -> None:
    close(losses.token_mean(X, MASK, 12), 0.5)
    close(losses.sequence_mean(X, MASK, 10), 0.45)
    close(losses.sequence_sum(X, MASK, torch.tensor(4)), 1.5)
    close(losses.constant_norm(X, MASK, 4, length=2), 0.75)


def test_a_row_without_tokens_does_not_count() -> None:
    x = torch.cat([X, torch.full((1, 3), NAN)])
    mask = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
    close(losses.sequence_mean(x, mask), 2.25)
    close(losses.sequence_sum(x, mask), 3.0)


def constant_norm_7(x: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    return losses.constant_norm(x, mask, count, length=7)


AGGREGATIONS = [losses.token_mean, losses.sequence_mean, losses.sequence_sum, constant_norm_7]


@properties
@given(tables(), st.integers(1, 3))
def test_micro_batches_add_up(table: tuple[Tensor, Tensor], size: int) -> None:
    """Losses and gradients of micro-batches sum to those of the batch."""
    values, mask = table
    for aggregate in AGGREGATIONS:
        count = int(mask.sum()) if aggregate is losses.token_mean else len(mask)
        whole = values.clone().requires_grad_()
        total = aggregate(whole, mask)
        total.backward()
        parts = values.clone().requires_grad_()
        summed = 0.0
        for i in range(0, len(mask), size):
            part = aggregate(parts[i : i + size], mask[i : i + size], count)
            part.backward()
            summed += part.item()
        close(total.detach(), summed, atol=1e-9)
        assert whole.grad is not None
        assert parts.grad is not None
        close(parts.grad, whole.grad, atol=1e-9)
        assert whole.grad[mask].ne(0).all()
        assert whole.grad[~mask].eq(0).all()


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_aggregations_check_their_input(aggregate: object) -> None:
    empty = torch.zeros_like(MASK)
    with pytest.raises(ValueError, match="`mask` must count at least one token, got none"):
        aggregate(X, empty)  # type: ignore[operator]
    with pytest.raises(ValueError, match="`count` must be > 0, got 0"):
        aggregate(X, MASK, 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="`mask` must be a bool tensor"):
        aggregate(X, MASK.long())  # type: ignore[operator]
    with pytest.raises(ValueError, match="`mask`, `x` must have the same shape"):
        aggregate(X, MASK[:, :2])  # type: ignore[operator]
    close(aggregate(X, empty, 5), 0.0)  # type: ignore[operator]


def test_constant_norm_checks_its_length() -> None:
    with pytest.raises(ValueError, match="`length` must be > 0, got 0"):
        losses.constant_norm(X, MASK, length=0)
