"""A trainer whose rate sets itself: the policy goes as far as asked for, from any first rate."""

import dataclasses
import math

import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl import config as settings
from trl.batch import Rollout
from trl.compute.processes import scores_differ
from trl.config import PPOConfig
from trl.config.recipe import Recipe
from trl.optimization.auto_rate import AutoRate
from trl.optimization.kl import AdaptiveKLController
from trl.optimization.value_pretraining import ValuePretraining
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training.loop import Loop

LENGTHS = [3, 1, 4, 2, 5, 2, 3, 4] * 3


def rollout(step):
    queries = ragged(LENGTHS, seed=step)
    return Rollout.from_lists(queries, ragged(LENGTHS[::-1], seed=100 + step))


def scores(step):
    return torch.randn(24, generator=torch.Generator().manual_seed(step))


def trainer_of(**settings):
    defaults = {
        "precision": "fp32",
        "batch_size": 24,
        "minibatch_size": 6,
        "ppo_epochs": 1,
        "learning_rate": "auto",
        "init_kl_coef": 0.01,
    }
    return PPOTrainer(tiny_gpt2(0), **defaults | settings)


def moved(trainer, step):
    """½·mean((log π − log π_old)²) of a whole step."""
    data = rollout(step)
    before = trainer.forward_pass(trainer.policy, data).logprobs
    trainer.step(data, scores(step))
    after = trainer.forward_pass(trainer.policy, data).logprobs
    return float(0.5 * (after - before)[data.response_mask].square().mean())


@pytest.mark.parametrize(
    ("first", "rows"),
    [
        (1e-6, 6),
        pytest.param(1e-2, 6, marks=pytest.mark.slow),
        pytest.param(1e-2, 24, marks=pytest.mark.slow),  # one update
    ],
)
def test_the_policy_goes_as_far_as_asked_for(first, rows):
    trainer = trainer_of(auto_initial_rate=first, minibatch_size=rows, auto_rate_bounds=(1e-9, 1.0))
    found = [moved(trainer, step) for step in range(16)]
    last = sorted(found[-8:])
    # Around 0.01, and above: what an update has seen moves further than what it is measured on.
    assert 0.004 < last[4] < 0.04
    assert max(found) < 0.15  # and never far from it, not in the first steps either


def test_a_fixed_rate_a_thousand_times_off_is_none_of_this():
    trainer = trainer_of(learning_rate=1e-2)
    assert moved(trainer, 0) > 0.1


def test_the_stats_tell_the_target_and_the_bounds():
    stats = trainer_of(auto_rate_bounds=(1e-9, 1e-8)).step(rollout(0), scores(0))
    assert stats["ppo/auto_rate/target"] == pytest.approx(0.01)
    assert stats["ppo/auto_rate/at_bound"] == 1.0
    assert not any(
        "auto" in name for name in trainer_of(learning_rate=1e-3).step(rollout(0), scores(0))
    )


def test_too_far_a_step_leaves_out_its_other_updates():
    trainer = trainer_of(
        auto_initial_rate=100.0, auto_rate_bounds=(1e-9, 100.0), ratio_threshold=1e30
    )
    stats = trainer.step(rollout(0), scores(0))
    assert stats["ppo/updates"] == 1


def test_values_have_a_rate_of_their_own():
    trainer = trainer_of(value_learning_rate=0.5)
    policy, values = trainer.optimizer.param_groups
    before = trainer.model.v_head.summary.bias.item()
    trainer.step(rollout(0), scores(0))
    assert values["lr"] == 0.5
    assert policy["lr"] == trainer.auto_rate.rate < 1e-2
    assert abs(trainer.model.v_head.summary.bias.item() - before) > 0.1
    assert {id(weight) for weight in values["params"]} == {
        id(weight) for weight in trainer.model.v_head.parameters()
    }


def test_values_with_the_policys_rate_are_as_ever():
    one, other = (
        trainer_of(learning_rate=1e-3),
        trainer_of(learning_rate=1e-3, value_learning_rate=1e-3),
    )
    for step in range(3):
        one.step(rollout(step), scores(step))
        other.step(rollout(step), scores(step))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"value_pretraining": 3}, {"value_learning_rate": 1e-2}])
def test_it_goes_on_exactly(settings):
    whole = trainer_of(**settings)
    for step in range(3):
        whole.step(rollout(step), scores(step))
    state = whole.state_dict()
    model = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    expected = [whole.step(rollout(step), scores(step)) for step in range(3, 6)]
    resumed = trainer_of(**settings)
    resumed.model.load_state_dict(model)
    resumed.load_state_dict(state)
    for step, stats in zip(range(3, 6), expected, strict=True):
        again = resumed.step(rollout(step), scores(step))
        assert again["ppo/loss/total"] == stats["ppo/loss/total"]
        assert resumed.auto_rate.rate > 0
    assert resumed.auto_rate == whole.auto_rate
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_another_kind_of_rate_is_refused():
    state, fixed = trainer_of().state_dict(), trainer_of(learning_rate=1e-3)
    with pytest.raises(ValueError, match="learning_rate"):
        fixed.load_state_dict(state)
    with pytest.raises(ValueError, match="auto_rate"):
        trainer_of().load_state_dict(
            state | {"auto_rate": {"rate": math.nan, "moved": 0, "spent": 0, "line": [0] * 5}}
        )


@pytest.mark.parametrize(
    ("algorithm", "one_score"),
    [
        ("ppo", [1.0] * 24),
        ("rloo", [n // 2 / 7 for n in range(24)]),  # differ, but not within a group of two
        ("grpo", [0.0, 0.0, 1.0, 1.0] * 6),
    ],
)
def test_where_no_score_differs_the_rate_does_not_grow(algorithm, one_score):
    """A policy that always answers right hardly moves, until a rate that grew breaks it."""
    trainer = trainer_of(algorithm=algorithm)
    groups = torch.arange(24) // 2

    def step(number, scores):
        data = dataclasses.replace(rollout(number), group_ids=groups)
        trainer.step(data, scores)
        return trainer.auto_rate.rate

    first = step(0, scores(0))
    assert step(1, scores(1)) > first
    kept = trainer.auto_rate.state_dict()
    after = [step(number, torch.tensor(one_score)) for number in range(2, 6)]
    assert max(after) <= kept["rate"]
    assert after == sorted(after, reverse=True)
    assert {"moved": kept["moved"], "spent": kept["spent"]}.items() <= (
        trainer.auto_rate.state_dict().items()
    )  # nothing was measured either


def test_what_differs_is_asked_of_rows_that_count():
    accelerator = trainer_of().accelerator
    counted, ids = torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1, 1])
    values = torch.tensor([1.0, 1.0, 0.0, 2.0])
    assert not scores_differ(accelerator, values, ids, counted)
    assert scores_differ(accelerator, values, ids, ~counted)
    assert not scores_differ(accelerator, values, ids, counted & ~counted)
    assert scores_differ(accelerator, torch.tensor([1.0, 1.0, 2.0, 2.0]), None, counted | True)
    assert scores_differ(accelerator, values[:1], None, counted[:1])  # of a batch of one


def test_a_schedule_scales_the_way_not_the_rate():
    trainer = trainer_of(value_learning_rate=1e-2)
    prompts = ragged([2, 3, 4, 2, 3, 2, 4, 3] * 3)
    loop = Loop(
        trainer,
        Sampler(None, max_new_tokens=4),
        lambda rollout: rollout.response_mask.sum(1).float(),
        prompts,
        schedule=lambda step: 0.5**step,
    )
    rows = [loop.step() for _ in range(3)]
    assert [row["ppo/auto_rate/target"] for row in rows] == pytest.approx([0.01, 0.0025, 0.000625])
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(1e-2 / 4)
    assert rows[-1]["learning_rate"] == trainer.auto_rate.rate


def test_values_learn_first_and_the_policy_waits():
    trainer = trainer_of(value_pretraining=2, value_learning_rate=1e-2)
    body = {n: w.clone() for n, w in trainer.model.named_parameters() if "v_head" not in n}
    for step in range(2):
        assert trainer.warming_up
        trainer.step(rollout(step), scores(step))
        assert all(torch.equal(trainer.model.get_parameter(n), w) for n, w in body.items())
    assert not trainer.warming_up
    trainer.step(rollout(2), scores(2))
    assert not all(torch.equal(trainer.model.get_parameter(n), w) for n, w in body.items())


def test_pretraining_of_values_ends_when_they_stop_getting_better():
    fit = ValuePretraining(most=40)
    noise = (0.0, 0.1, -0.1, 0.05, -0.05, 0.02, -0.02, 0.0)  # of each eight steps; its mean is 0
    for n in range(24):
        fit.count(-0.2 + 0.1 * (n // 8) + noise[n % 8])
        assert not fit.over
    for n in range(8):
        assert not fit.over
        fit.count(0.005 + noise[n])  # better by 0.005 than the eight before
    assert fit.over
    assert fit.done == 32
    other = ValuePretraining(most=40)
    other.load_state_dict(fit.state_dict())
    assert other == fit
    short = ValuePretraining(most=2, done=2)
    assert short.over


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="value_learning_rate"):
        PPOConfig(algorithm="rloo", value_learning_rate=1e-3)
    with pytest.raises(ValueError, match="value_pretraining"):
        PPOConfig(algorithm="rloo", value_pretraining=3)
    with pytest.raises(ValueError, match="auto_rate_bounds"):
        PPOConfig(auto_rate_bounds=(1e-2, 1e-3))
    with pytest.raises(ValueError, match="learning_rate"):
        PPOConfig(learning_rate="fast")


def test_what_learns_fills_only_what_is_not_written():
    config = PPOConfig.that_learns(ppo_epochs=3)
    assert (config.learning_rate, config.batch_size, config.ppo_epochs) == ("auto", 32, 3)
    assert PPOConfig.that_learns(lr=1e-4).value_learning_rate is None
    assert PPOConfig.that_learns(lr=1e-4).learning_rate == 1e-4
    assert PPOConfig.that_learns(algorithm="grpo").scale_scores is False
    assert [PPOConfig.that_learns(**given).gae_lambda for given in ({}, {"lam": 0.9})] == [1, 0.9]
    assert PPOConfig.that_learns(algorithm="rloo").gae_lambda == PPOConfig().gae_lambda
    assert (PPOConfig().learning_rate, PPOConfig().gae_lambda) == (1.41e-5, 0.95)  # as in 2020
    assert PPOConfig.that_learns(**dataclasses.asdict(PPOConfig())) == PPOConfig()


def test_the_adaptive_kl_acts_within_a_run():
    assert PPOConfig.that_learns(batch_size=64).kl_horizon == 640  # episodes
    assert PPOConfig.that_learns(batch_size=64, horizon=10_000.0).kl_horizon == 10_000
    with pytest.raises(ValueError, match="`batch_size` must be"):
        PPOConfig.that_learns(batch_size="64")
    config = PPOConfig.that_learns(adaptive_kl=True, init_kl_coef=0.2)
    controller = AdaptiveKLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
    for _ in range(20):
        controller.update(3 * config.kl_target, config.batch_size)
    assert controller.value == pytest.approx(0.2 * 1.02**20)  # 2020's horizon: 0.2026


def test_without_a_reference_there_is_no_penalty_unless_it_is_written():
    assert PPOConfig.that_learns(reference=False).init_kl_coef == 0
    recipe = settings.build(Recipe, {"model": {"reference": "none"}})
    assert recipe.ppo.init_kl_coef == 0
    with pytest.raises(settings.SettingsError, match="init_kl_coef"):
        settings.build(Recipe, {"model": {"reference": "none"}, "ppo": {"init_kl_coef": 0.1}})


def test_of_a_number_there_is_none():
    assert AutoRate.of(PPOConfig()) is None
    assert AutoRate.of(PPOConfig(learning_rate="auto", auto_approxkl=0.2)).target == 0.2
