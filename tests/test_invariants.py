"""What must not change the numbers does not; tolerances are relative, 1e-5 in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.models.response import ResponseModel
from trl.ppo import PPOTrainer

QUERIES, RESPONSES = [3, 7, 1, 5, 2, 6], [4, 1, 9, 2, 6, 3]


def gradient_of_one_update(rollout, scores, **settings):
    """Loss, stats and gradients of one update over the whole batch (SGD of rate 1)."""
    model = tiny_gpt2(0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = PPOTrainer(
        model,
        tiny_gpt2(1),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        **{
            "precision": "fp32",
            "batch_size": len(scores),
            "minibatch_size": len(scores),
            "ppo_epochs": 1,
            "max_grad_norm": None,
        }
        | settings,
    )
    stats = trainer.step(rollout, scores)
    gradient = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
    return stats, gradient


def assert_same(one, other, tolerance=1e-5):
    (stats, gradient), (other_stats, other_gradient) = one, other
    for name in ("ppo/loss/total", "ppo/loss/policy", "ppo/loss/value", "objective/kl"):
        assert stats[name] == pytest.approx(other_stats[name], rel=tolerance, abs=1e-6), name
    flat = torch.cat([gradient[name].flatten() for name in gradient])
    other_flat = torch.cat([other_gradient[name].flatten() for name in gradient])
    assert flat.norm() > 0
    assert (flat - other_flat).norm() <= tolerance * flat.norm()


def rollout_and_scores():
    rollout = Rollout.from_lists(ragged(QUERIES), ragged(RESPONSES, seed=1))
    return rollout, torch.linspace(-2, 1, 6)


@pytest.mark.parametrize("forward_batch_size", [1, 2, 4, None])
@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
def test_forward_batch_size_and_token_budget(forward_batch_size, token_budget):
    whole = gradient_of_one_update(*rollout_and_scores(), forward_batch_size=64)
    split = gradient_of_one_update(
        *rollout_and_scores(), forward_batch_size=forward_batch_size, token_budget=token_budget
    )
    assert_same(whole, split)


def test_extra_padding():
    rollout, scores = rollout_and_scores()
    pad = torch.nn.functional.pad
    padded = Rollout(
        pad(rollout.queries, (4, 0)),
        pad(rollout.query_mask, (4, 0)),
        pad(rollout.responses, (0, 3)),
        pad(rollout.response_mask, (0, 3)),
    )
    assert_same(gradient_of_one_update(rollout, scores), gradient_of_one_update(padded, scores))


def test_the_content_of_padding_is_never_looked_at():
    rollout, scores = rollout_and_scores()
    filled = Rollout(
        rollout.queries.masked_fill(~rollout.query_mask, 13),
        rollout.query_mask,
        rollout.responses.masked_fill(~rollout.response_mask, 17),
        rollout.response_mask,
    )
    assert_same(gradient_of_one_update(rollout, scores), gradient_of_one_update(filled, scores))


def test_batch_order():
    order = [4, 0, 5, 2, 1, 3]
    scores = torch.linspace(-2, 1, 6)
    shuffled = Rollout.from_lists(
        [ragged(QUERIES)[i] for i in order], [ragged(RESPONSES, seed=1)[i] for i in order]
    )
    assert_same(
        gradient_of_one_update(*rollout_and_scores()),
        gradient_of_one_update(shuffled, scores[order]),
    )


def test_padded_rows_equal_rows_alone():
    model = ResponseModel(tiny_gpt2())
    queries, responses = ragged(QUERIES), ragged(RESPONSES, seed=1)
    together = model(Rollout.from_lists(queries, responses))
    for row in range(6):
        alone = model(Rollout.from_lists([queries[row]], [responses[row]]))
        for column, single in zip(together[:3], alone[:3], strict=True):
            torch.testing.assert_close(
                column[row, : RESPONSES[row]], single[0], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("equal_lengths", [True, False])
def test_first_minibatch_has_ratio_1_and_approxkl_0(equal_lengths):
    queries = ragged([4] * 6 if equal_lengths else QUERIES)
    responses = ragged([5] * 6 if equal_lengths else RESPONSES, seed=1)
    stats, _ = gradient_of_one_update(
        Rollout.from_lists(queries, responses), torch.linspace(-2, 1, 6), forward_batch_size=2
    )
    assert abs(stats["ppo/policy/ratio"] - 1).max() < 1e-5
    assert stats["ppo/policy/approxkl"] < 1e-10
    assert stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/first_log_ratio"] < 1e-5


def test_first_minibatch_in_bf16_is_near():
    stats, _ = gradient_of_one_update(*rollout_and_scores(), precision="bf16", forward_batch_size=2)
    assert abs(stats["ppo/policy/ratio"] - 1).max() < 0.05
    assert stats["ppo/first_log_ratio"] < 0.01


def test_identical_models_have_kl_0():
    model, same = tiny_gpt2(0), tiny_gpt2(0)
    stats = PPOTrainer(model, same, precision="fp32", batch_size=6).step(*rollout_and_scores())
    assert stats["objective/kl"] == 0
    assert abs(stats["objective/kl_dist"]).max() == 0
    assert stats["ppo/mean_non_score_reward"] == 0


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=2, max_size=6),
    passes=st.integers(1, 3),
)
def test_any_ragged_batch_is_split_without_a_trace(lengths, passes):
    rollout = Rollout.from_lists(
        ragged([q for q, _ in lengths]), ragged([r for _, r in lengths], seed=1)
    )
    scores = torch.linspace(-1, 1, len(lengths))
    if sum(r for _, r in lengths) < 3:
        return  # whitening two numbers amplifies rounding
    whole = gradient_of_one_update(rollout, scores, forward_batch_size=None)
    split = gradient_of_one_update(rollout, scores, forward_batch_size=passes)
    assert_same(whole, split, tolerance=3e-5)
