import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import counted, numbers, properties, tables
from tests.test_core import NAN, F, T, close
from trl.config import PPOConfig
from trl.optimization.advantages import (
    discounted_returns,
    gae,
    group_normalize,
    leave_one_out,
    length_adaptive_lambda,
)
from trl.optimization.algorithms import estimate_gae

fractions = st.sampled_from([0.0, 0.5, 0.9, 1.0])

# --- generalized advantage estimation -----------------------------------------------------------


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]], requires_grad=True)
    advantages, returns = gae(rewards, values, torch.tensor([[T, T, T]]), gamma=0.9, gae_lambda=0.8)
    # δ: 3 − 1.5 = 1.5; 2 + 0.9·1.5 − 1 = 2.35; 1 + 0.9·1 − 0.5 = 1.4;   γλ = 0.72
    # Â: 1.5; 2.35 + 0.72·1.5 = 3.43; 1.4 + 0.72·3.43 = 3.8696
    close(advantages, [[3.8696, 3.43, 1.5]])
    close(returns, [[4.3696, 4.43, 3.0]])
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_walks_over_holes_as_if_they_were_not_there() -> None:
    # the tokens of the test above with holes before, between and after them
    rewards = torch.tensor([[NAN, 1.0, 7.0, NAN, 2.0, 3.0, 9.0]])
    values = torch.tensor([[9.0, 0.5, NAN, 8.0, 1.0, 1.5, NAN]])
    mask = torch.tensor([[F, T, F, F, T, T, F]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    close(advantages, [[0.0, 3.8696, 0.0, 0.0, 3.43, 1.5, 0.0]])
    close(returns, [[0.0, 4.3696, 0.0, 0.0, 4.43, 3.0, 0.0]])


def test_gae_of_one_token() -> None:
    # a 2020 fault: a response of one token gave NaN
    advantages, returns = gae(
        torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[T]]), gamma=1, gae_lambda=0.95
    )
    close(advantages, [[1.5]])
    close(returns, [[2.0]])


def test_gae_with_one_lambda_per_row() -> None:
    rewards, values = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[0.5, 0.25]] * 2)
    mask = torch.tensor([[T, T]] * 2)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, gae_lambda=torch.tensor([0.0, 1.0]))
    # last: 1 − 0.25; first: 0 + 0.25 − 0.5 = −0.25, + λ·0.75
    close(advantages, [[-0.25, 0.75], [0.5, 0.75]])


@properties
@given(tables(2), fractions, fractions)
def test_gae_agrees_with_its_definition(
    table: tuple[Tensor, Tensor, Tensor], gamma: float, gae_lambda: float
) -> None:
    """Â_t = Σ_l (γλ)^l·δ_{t+l}, over the counted tokens alone."""
    rewards, values, mask = table
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, (r, v) in enumerate(zip(counted(rewards, mask), counted(values, mask), strict=True)):
        n = len(r)
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        expected = [
            sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)
        ]
        close(advantages[row][mask[row]], expected, atol=1e-9)
        close(returns[row][mask[row]], [a + x for a, x in zip(expected, v, strict=True)], atol=1e-9)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@properties
@given(tables(2), fractions)
def test_with_lambda_1_the_critic_does_not_change_the_returns(
    table: tuple[Tensor, Tensor, Tensor], gamma: float
) -> None:
    rewards, values, mask = table
    _, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    close(returns, discounted_returns(rewards, mask, gamma=gamma), atol=1e-9)


def test_the_values_have_a_lambda_of_their_own() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]])
    mask = torch.tensor([[T, T, T]])
    # δ: 1 − 0.6 = 0.4; 0.6 − 0.4; 0.4 − 0.2. Â at 0.95: 0.4; 0.2 + 0.38; 0.2 + 0.551
    found = estimate_gae(rewards, values, mask, None, PPOConfig(gae_lambda_value=1.0))
    close(found.advantages, [[0.751, 0.58, 0.4]])
    close(found.returns, [[1.0, 1.0, 1.0]])
    same = estimate_gae(rewards, values, mask, None, PPOConfig())
    assert torch.equal(same.advantages, found.advantages)
    close(same.returns, [[0.951, 0.98, 1.0]])


@pytest.mark.parametrize(
    ("rewards", "values", "mask", "expected"),
    [
        ([0, 0, 1], [0, 9, 0], [T, F, T], [0.95, 0, 1]),  # a hole: δ 1 and 0, not across the 9
        ([0, 1, 0], [0, 0, 100], [T, T, F], [0.95, 1, 0]),  # padding
    ],
)
def test_gae_next_to_what_does_not_count(rewards, values, mask, expected) -> None:
    columns = (torch.tensor([row], dtype=torch.float32) for row in (rewards, values))
    advantages, _ = gae(*columns, torch.tensor([mask]), gamma=1.0, gae_lambda=0.95)
    close(advantages, [expected])


def test_lambda_by_the_length_by_hand() -> None:
    # 1 − 1/max(0.05·l, 1): 0.05·10 < 1; 1; 5; 50
    close(length_adaptive_lambda(torch.tensor([10, 20, 100, 1000]), 0.05), [0.0, 0.0, 0.8, 0.98])
    with pytest.raises(ValueError, match="`alpha` must be > 0, got 0"):
        length_adaptive_lambda(torch.tensor([1]), 0)


def test_vapo_is_what_its_paper_sets() -> None:
    vapo, names = PPOConfig(algorithm="vapo"), ["gae_lambda_value", "length_adaptive"]
    names += ["cliprange_high", "positive_coef", "value_pretraining"]
    assert [vapo.in_force(name) for name in names] == [1.0, 0.05, 0.28, 0.1, 50]
    rewards, values = torch.zeros(1, 100), torch.linspace(0, 1, 100)[None]
    mask = torch.ones(1, 100, dtype=torch.bool)
    found = estimate_gae(rewards, values, mask, None, vapo)
    close(found.advantages, gae(rewards, values, mask, gamma=1.0, gae_lambda=0.8)[0], atol=1e-6)
    close(found.returns, rewards)


@properties
@given(tables(2), st.sampled_from([0.05, 0.5, 2.0]), st.sampled_from([None, 0.5, 1.0]))
def test_both_lambdas_agree_with_a_row_by_row_estimate(
    table: tuple[Tensor, Tensor, Tensor], alpha: float, of_values: float | None
) -> None:
    rewards, values, mask = table
    config = PPOConfig(gamma=0.9, length_adaptive=alpha, gae_lambda_value=of_values)
    found = estimate_gae(rewards, values, mask, None, config)
    assert found.returns is not None
    for row in range(len(mask)):
        counts = mask[row : row + 1]
        actor = 1 - 1 / max(alpha * int(counts.sum()), 1)
        assert 0 <= actor < 1
        alone = rewards[row : row + 1], values[row : row + 1], counts
        expected, returns = gae(*alone, gamma=0.9, gae_lambda=actor)
        if of_values is not None:
            returns = gae(*alone, gamma=0.9, gae_lambda=of_values)[1]
        close(found.advantages[row : row + 1], expected, atol=1e-4)
        close(found.returns[row : row + 1], returns, atol=1e-4)


def test_gae_is_computed_in_fp32() -> None:
    ones = torch.ones(1, 600, dtype=torch.bfloat16)
    mask = torch.ones(1, 600, dtype=torch.bool)
    advantages, _ = gae(ones, torch.zeros_like(ones), mask, gamma=1, gae_lambda=1)
    assert advantages.dtype == torch.float32
    assert advantages[0, 0] == 600  # a bf16 sum of ones stops at 256


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "message"),
    [
        (1.1, 0.9, "`gamma` must be in 0 … 1, got 1.1"),
        (0.9, -0.1, "`gae_lambda` must be in 0 … 1, got -0.1"),
        (0.9, NAN, "`gae_lambda` must be in 0 … 1, got nan"),
        (0.9, torch.tensor([0.5, 2.0]), "`gae_lambda` must be in 0 … 1, got tensor"),
    ],
)
def test_gae_checks_gamma_and_lambda(
    gamma: float, gae_lambda: float | Tensor, message: str
) -> None:
    table = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=message):
        gae(table, table, table == 0, gamma=gamma, gae_lambda=gae_lambda)


def test_gae_checks_shapes() -> None:
    with pytest.raises(ValueError, match=r"`mask`, `rewards`, `values` must have the same shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3) == 0, gamma=1, gae_lambda=1)


# --- without a critic ---------------------------------------------------------------------------


def test_discounted_returns() -> None:
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0, NAN]])
    mask = torch.tensor([[T, F, T, T, F]])
    # 4; 2 + ½·4 = 4; 1 + ½·4 = 3
    close(discounted_returns(rewards, mask, gamma=0.5), [[3.0, 0.0, 4.0, 4.0, 0.0]])


@properties
@given(tables(), fractions)
def test_discounted_returns_agree_with_their_definition(
    table: tuple[Tensor, Tensor], gamma: float
) -> None:
    rewards, mask = table
    returns = discounted_returns(rewards, mask, gamma=gamma)
    for row, r in enumerate(counted(rewards, mask)):
        expected = [sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
        close(returns[row][mask[row]], expected, atol=1e-9)
    assert not returns[~mask].any()


GROUP_IDS = torch.tensor([7, 3, 7, 3, 7])  # interleaved, not numbered from 0, of sizes 3 and 2
SCORES = torch.tensor([1.0, 5.0, 2.0, 4.0, 6.0])


def test_leave_one_out() -> None:
    # group 7: 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; group 3: 5 − 4, 4 − 5
    close(leave_one_out(SCORES, GROUP_IDS), [-3.0, 1.0, -1.5, -1.0, 4.5])


def test_group_normalize() -> None:
    # group 7: mean 3, deviations −2, −1, 3, √(14/2) = 2.6457513; group 3: ±½ over √½ = 0.7071068
    expected = [-0.7559289, 0.7071068, -0.3779645, -0.7071068, 1.1338934]
    close(group_normalize(SCORES, GROUP_IDS, eps=0.0), expected)
    close(group_normalize(SCORES, GROUP_IDS), expected, rtol=2e-6)
    # eps = 1: 3 / 3.6457513
    close(group_normalize(SCORES, GROUP_IDS, eps=1.0)[4], 0.8228757)
    close(group_normalize(SCORES, GROUP_IDS, scale=False), [-2.0, 0.5, -1.0, -0.5, 3.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.0, 10.1, -12345.67, 0.1, 1e-30])
@pytest.mark.parametrize("size", [2, 3, 7, 12, 64, 1000])
def test_equal_scores_give_exactly_0(size: int, score: float, dtype: torch.dtype) -> None:
    """Twelve scores of 10.1 gave |A| 0.48: σ of rounding errors is no larger than they are."""
    scores = torch.cat(
        (torch.full((size,), score, dtype=dtype), torch.tensor([0.0, 1.0]).to(dtype))
    )
    group_ids = torch.tensor([5] * size + [3, 3])
    order = torch.randperm(size + 2)
    for advantages in (
        leave_one_out(scores[order], group_ids[order]),
        group_normalize(scores[order], group_ids[order]),
        group_normalize(scores[order], group_ids[order], scale=False),
    ):
        of_equal = group_ids[order] == 5
        assert (advantages[of_equal] == 0).all()
        assert (advantages[~of_equal] != 0).all()


def test_a_group_of_equal_scores_teaches_nothing() -> None:
    scores, group_ids = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3)
    for advantages in (leave_one_out(scores, group_ids), group_normalize(scores, group_ids)):
        close(advantages, [0.0, 0.0, 0.0])


@properties
@given(st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=2, max_size=9))
def test_groups_agree_with_plain_loops(samples: list[tuple[float, int]]) -> None:
    groups: dict[int, list[float]] = {}
    for score, group in samples:
        groups.setdefault(group, []).append(score)
    assume(all(len(group) > 1 for group in groups.values()))
    scores = torch.tensor([score for score, _ in samples]).double()
    group_ids = torch.tensor([group for _, group in samples])

    others = []
    for i, (score, group) in enumerate(samples):
        rest = [s for j, (s, g) in enumerate(samples) if g == group and j != i]
        others.append(score - statistics.fmean(rest))
    close(leave_one_out(scores, group_ids), others, atol=1e-9)

    normal = [
        (score - statistics.fmean(groups[group])) / (statistics.stdev(groups[group]) + 0.1)
        for score, group in samples
    ]
    close(group_normalize(scores, group_ids, eps=0.1), normal, atol=1e-7)


@pytest.mark.parametrize("function", [leave_one_out, group_normalize])
def test_groups_are_checked(function: object) -> None:
    with pytest.raises(
        ValueError, match=r"at least 2 responses in each group, got 1 in group\(s\) \[3\]"
    ):
        function(torch.zeros(3), torch.tensor([7, 3, 7]))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"`group_ids` must be \[B\]"):
        function(torch.zeros(3, 1), torch.tensor([[7], [3], [7]]))  # type: ignore[operator]
