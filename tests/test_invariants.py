"""What must not change the numbers does not; tolerances are relative, 1e-5 in float32."""

from dataclasses import replace

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
    return stats, gradient, trainer


def assert_same(one, other, tolerance=1e-5):
    (stats, gradient, _), (other_stats, other_gradient, _) = one, other
    names = "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value", "objective/kl"
    for name in (name for name in names if name in other_stats):
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


@pytest.mark.parametrize(
    ("settings", "silent"),
    [
        ({"whiten_rewards": True, "scale_scores": True, "center_scores": True}, [2]),
        ({"adaptive_kl": True, "kl_horizon": 100, "aggregate": "sequence"}, [0, 4, 5]),
        ({"algorithm": "grpo", "forward_batch_size": 2}, [1]),
        ({"algorithm": "rloo", "policy_loss": "gspo"}, [1]),
        ({"algorithm": "grpo", "missing_eos_penalty": 1.0}, [0, 1, 4]),  # 2 is alone then
    ],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_a_row_without_a_say_is_a_row_that_is_not_there(settings, silent, per_token):
    """Figures, gradients, coefficients and moments are those of the batch without it."""
    rollout, scores = rollout_and_scores()
    groups = torch.tensor([7, 7, 7, 2, 2, 2])
    rollout = replace(rollout, group_ids=groups, ended=torch.arange(6) % 2 > 0)
    gone = {*silent, 2} if "missing_eos_penalty" in settings else set(silent)
    rows = [row for row in range(6) if row not in gone]
    if per_token and "missing_eos_penalty" in settings:
        return  # which is for whole responses
    given = [float(score) for score in scores]
    if per_token:
        given = [[s / 2] * n for s, n in zip(given, rollout.response_mask.sum(1), strict=True)]
    with_none = [None if row in silent else score for row, score in enumerate(given)]
    said = [given[row] for row in rows]
    one = gradient_of_one_update(rollout, with_none, **settings)
    sizes = {"batch_size": len(rows), "minibatch_size": len(rows)}
    other = gradient_of_one_update(rollout.select(rows), said, **sizes | settings)
    assert_same(one, other, 1e-6)
    assert one[0].keys() == other[0].keys()
    for name, value in other[0].items():
        if not name.startswith("time/"):
            torch.testing.assert_close(
                torch.as_tensor(one[0][name]), torch.as_tensor(value), rtol=1e-6, atol=1e-6
            )
    assert len(one[0]["objective/kl_dist"]) == len(rows)
    if "adaptive_kl" in settings:
        assert one[2].kl_ctl.value == other[2].kl_ctl.value != one[2].config.init_kl_coef
    assert one[2].score_moments.state_dict() == other[2].score_moments.state_dict()


def test_a_batch_on_which_nothing_has_a_say_changes_nothing_but_the_count():
    rollout, _ = rollout_and_scores()
    trainer = PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), batch_size=6, precision="fp32")
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    state = trainer.state_dict()
    with pytest.warns(UserWarning, match="must be numbers for some responses, got None for all 6"):
        stats = trainer.step(rollout, [None] * 6)
    assert stats["ppo/updates"] == stats["ppo/skipped_updates"] == 0
    assert all(map(torch.equal, before, trainer.model.parameters()))
    after = trainer.state_dict()
    assert after.pop("steps_done") == state.pop("steps_done") + 1
    assert str(after) == str(state)
    with pytest.raises(ValueError, match="finite numbers, got nan for 1 of 6 responses, in row 2"):
        trainer.step(rollout, torch.tensor([1, 2, float("nan"), 4, 5, 6]))


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
    stats, *_ = gradient_of_one_update(
        Rollout.from_lists(queries, responses), torch.linspace(-2, 1, 6), forward_batch_size=2
    )
    assert abs(stats["ppo/policy/ratio"] - 1).max() < 1e-5
    assert stats["ppo/policy/approxkl"] < 1e-10
    assert stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/first_log_ratio"] < 1e-5


def test_first_minibatch_in_bf16_is_near():
    stats, *_ = gradient_of_one_update(
        *rollout_and_scores(), precision="bf16", forward_batch_size=2
    )
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
