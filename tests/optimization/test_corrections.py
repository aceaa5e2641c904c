"""Weights for what another engine, or an older policy, has written: by hand, and in a step."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import ragged, tiny_gpt2
from tests.strategies import counted, properties, tables
from tests.test_core import NAN, F, T, close
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.config.algorithms import CORRECTIONS as BOUNDS
from trl.optimization.corrections import (
    CORRECTIONS,
    ERROR,
    check_prob_error,
    corrected,
    multiplied_error,
)
from trl.ppo import PPOTrainer

RATIOS = torch.tensor([[0.3, 1.0, 3.0]])


def weights(name: str, ratios: Tensor, mask: Tensor, bounds=None) -> tuple[Tensor, Tensor]:
    """With μ = ½ for every token, so that it is the ratio that counts."""
    behaviour = torch.full_like(ratios, 0.5).log()
    old = ratios.log() + behaviour
    return CORRECTIONS[name](old, behaviour, mask, torch.zeros_like(ratios), bounds or BOUNDS[name])


@pytest.mark.parametrize(
    ("name", "bounds", "expected", "touched"),
    [
        ("tis", (0.0, 2.0), [0.3, 1.0, 2.0], [F, F, T]),
        ("icepop", (0.5, 5.0), [0.0, 1.0, 3.0], [T, F, F]),
        ("sequence_tis", (0.0, 2.0), [0.9, 0.9, 0.9], [F, F, F]),  # 0.3·1·3
        ("sequence_tis", (0.0, 0.5), [0.5, 0.5, 0.5], [T, T, T]),
        ("geometric", (0.95, 1.1), [1.0, 1.0, 1.0], [F, F, F]),  # 0.9^⅓ = 0.965
        ("geometric", (0.99, 1.01), [0.0, 0.0, 0.0], [T, T, T]),
    ],
)
def test_weights_by_hand(name, bounds, expected, touched):
    found, which = weights(name, RATIOS, torch.ones(1, 3, dtype=torch.bool), bounds)
    close(found, [expected], atol=1e-6)
    assert which.tolist() == [touched]


def test_the_total_variation_mask_by_hand():
    # (μ, π_old, Â): 0.5 → 0.9 is +0.4, too far where it pays, well where it does not; 0.9 → 0.5 the
    # other way round; 1e-4 → 1e-2 is a hundred times likelier and 0.0099 further: kept, at most 20
    behaviour = torch.tensor([[0.5, 0.5, 0.9, 0.9, 1e-4, 0.5]])
    old = torch.tensor([[0.9, 0.9, 0.5, 0.5, 1e-2, 0.6]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.ones_like(old, dtype=torch.bool)
    found, touched = CORRECTIONS["dppo"](
        old.log(), behaviour.log(), mask, advantages, (-0.15, 0.15)
    )
    close(found, [[0.0, 1.8, 0.5 / 0.9, 0.0, 20.0, 1.2]], rtol=1e-5)
    assert touched.tolist() == [[T, F, F, T, F, F]]


def test_the_clip_around_what_sampled_by_hand():
    # ρ and Â: a token that became likelier is pushed no further up, but down as much as ever
    ratios = torch.tensor([[1.3, 1.3, 0.7, 0.7, 1.1, 40.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones_like(ratios, dtype=torch.bool)
    behaviour = torch.full_like(ratios, 1e-2).log()
    found, touched = CORRECTIONS["clip"](
        ratios.log() + behaviour, behaviour, mask, advantages, (0.8, 1.2)
    )
    close(found, [[0.0, 1.3, 0.7, 0.0, 1.1, 20.0]], rtol=1e-5)
    assert touched.tolist() == [[T, F, F, T, F, F]]


@properties
@given(tables(3))
def test_the_clip_has_the_gradient_of_ppo_with_what_sampled_in_place_of_the_policy(table):
    old, behaviour, advantages, mask = table
    old, behaviour = -old.abs() - 0.01, -behaviour.abs() - 0.01
    weights, _ = CORRECTIONS["clip"](old, behaviour, mask, advantages, (0.8, 1.2))
    policy = old.clone().requires_grad_()
    ratio = torch.where(mask, policy - behaviour, 0.0).exp()
    gained = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gained.sum().backward()
    small = mask & ((old - behaviour).exp() < 20)
    close(policy.grad[small], (weights * advantages)[small], rtol=1e-6, atol=1e-9)


def plain(name, rho, probabilities, advantages, bounds):
    """The weights of one response by a loop, from ρ, (μ, π_old) and Â of its tokens."""
    low, high = bounds
    whole = math.prod(rho)
    mean = whole ** (1 / len(rho))
    out = []
    for r, (mu, pi), a in zip(rho, probabilities, advantages, strict=True):
        if name == "tis":
            out.append(min(max(r, low), high))
        elif name == "sequence_tis":
            out.append(min(max(whole, low), high))
        elif name == "icepop":
            out.append(r if low <= r <= high else 0.0)
        elif name == "geometric":
            out.append(1.0 if low <= mean <= high else 0.0)
        else:
            moved = r if name == "clip" else pi - mu
            out.append(min(r, 20.0) * ((moved <= high) if a > 0 else (moved >= low)))
    return out


@properties
@given(tables(3), st.sampled_from(list(CORRECTIONS)), st.sampled_from([None, (-0.4, 1.5)]))
def test_weights_agree_with_a_plain_loop(table, name, bounds):
    old, behaviour, advantages, mask = table
    old, behaviour = -old.abs() - 0.01, -behaviour.abs() - 0.01
    bounds = bounds or BOUNDS[name]
    found, touched = CORRECTIONS[name](old, behaviour, mask, advantages, bounds)
    columns = (counted(x, mask) for x in (old, behaviour, advantages))
    for row, (pi, mu, a) in enumerate(zip(*columns, strict=True)):
        rho = [math.exp(p - m) for p, m in zip(pi, mu, strict=True)]
        both = [(math.exp(m), math.exp(p)) for p, m in zip(pi, mu, strict=True)]
        close(found[row][mask[row]], plain(name, rho, both, a, bounds), rtol=1e-6, atol=1e-8)
    assert not found[~mask].any()
    assert not touched[~mask].any()
    assert (found >= 0).all()


@properties
@given(tables(2), st.sampled_from(list(CORRECTIONS)))
def test_what_the_policy_wrote_itself_has_weight_1_exactly(table, name):
    logprobs, advantages, mask = table
    logprobs = -logprobs.abs().float()
    found, touched = CORRECTIONS[name](logprobs, logprobs.clone(), mask, advantages, BOUNDS[name])
    assert torch.equal(found, mask.float())
    assert not touched.any()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_does_not_count_has_no_say(name):
    spoilt = torch.tensor([[0.3, NAN, 1.0, 3.0, 7.0]])
    mask = torch.tensor([[T, F, T, T, F]])
    found, _ = weights(name, spoilt, mask)
    alone, _ = weights(name, RATIOS, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(found[mask], alone[0])
    assert not found[~mask].any()


def test_a_broken_token_does_not_overflow():
    logs = torch.tensor([[-200.0, 0.0], [0.0, -200.0]])
    for name in CORRECTIONS:
        found, _ = CORRECTIONS[name](
            logs, logs.flip(1), torch.ones(2, 2, dtype=torch.bool), logs, BOUNDS[name]
        )
        assert found.isfinite().all(), name


def test_the_error_by_hand():
    # e^|log 0.3| = 1/0.3, 1, 3; the mean of the two that count: 13/6
    mask = torch.tensor([[T, F, T]])
    error = multiplied_error(RATIOS.log(), torch.tensor([[0.0, NAN, 0.0]]), mask)
    close(error, [[1 / 0.3, 0.0, 3.0]])
    assert float(error.sum() / 2) == pytest.approx(19 / 6)


def test_without_a_correction_the_error_alone_is_known():
    ones = torch.zeros(1, 3)
    mask = ones == 0
    found, columns = corrected(ones, ones, mask, ones, PPOConfig())
    assert found is None
    assert list(columns) == ["behaviour/token_mult_prob_error"]


# -- in a step -----------------------------------------------------------------------------------

SCORES = [1.0, -1.0, 0.5, 2.0, 0.0, 3.0]


def stepped(off: float = 0.0, **settings):
    """Stats and weights after a step on a rollout recorded as likelier by so many nats at times."""
    defaults = {"precision": "fp32", "batch_size": 6, "minibatch_size": 3, "learning_rate": 1e-2}
    trainer = PPOTrainer(tiny_gpt2(1), tiny_gpt2(0), **defaults | settings)
    rollout = Rollout.from_lists(ragged([3, 5, 2, 4, 1, 3]), ragged([4, 1, 7, 2, 6, 3], seed=5))
    output = trainer.forward_pass(trainer.policy, rollout)
    shift = off * torch.linspace(-1, 1, output.logprobs.shape[1])
    recorded = (output.logprobs - shift).clamp(max=0)
    rollout = replace(rollout, behaviour_logprobs=recorded, values=output.values)
    stats = trainer.step(rollout, SCORES)
    return stats, [weight.detach().clone() for weight in trainer.model.parameters()]


@pytest.mark.parametrize(
    ("name", "masked", "truncated", "weight"),
    [("tis", [0, 0, 0], [0, 0, 1], [0.3, 1, 2]), ("icepop", [1, 0, 0], [0, 0, 0], [0, 1, 3])],
)
def test_what_a_correction_says_of_itself(name, masked, truncated, weight):
    mask = torch.ones(1, 3, dtype=torch.bool)
    old, behaviour = RATIOS.log() - 2, torch.full_like(RATIOS, -2.0)
    found, columns = corrected(old, behaviour, mask, RATIOS, PPOConfig(correction=name))
    close(found, [weight])
    for figure, expected in (("masked", masked), ("truncated", truncated), ("weight", weight)):
        close(columns[f"behaviour/{figure}"], [expected])


def test_a_ratio_at_a_bound_is_inside():
    old, behaviour = torch.tensor([[-3.0, -2.0]]), torch.tensor([[-2.0, -3.0]])  # 1/e and e
    bounds = tuple((old - behaviour).exp()[0].tolist())
    mask = torch.ones(1, 2, dtype=torch.bool)
    found, touched = CORRECTIONS["icepop"](old, behaviour, mask, old, bounds)
    assert found.tolist() == [list(bounds)]
    assert not touched.any()


@pytest.mark.parametrize(
    ("error", "warns", "stops"),
    [(1.049, F, F), (1.051, T, F), (1.099, T, F), (1.101, T, T)],
)
def test_where_the_gate_warns_and_stops(error, warns, stops):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            check_prob_error({ERROR: error}, PPOConfig())
        except RuntimeError:
            assert stops
        else:
            assert not stops
            assert bool(told) == warns


@pytest.fixture(scope="module")
def plain_step():
    return stepped()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_reused_is_learned_bit_by_bit_as_without_a_correction(name, plain_step):
    stats, after = stepped(correction=name)
    assert all(map(torch.equal, after, plain_step[1]))
    assert stats.keys() == plain_step[0].keys()
    for key in plain_step[0]:
        if isinstance(stats[key], float) and not key.startswith("time/"):
            assert stats[key] == plain_step[0][key], key


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_computed_again_with_the_same_result_has_weight_1(name, plain_step):
    stats, _ = stepped(correction=name, reuse_recorded=False)
    assert stats["ppo/behaviour/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
    assert stats["ppo/behaviour/weight"] == pytest.approx(1, abs=1e-4)
    assert stats["ppo/behaviour/masked"] == stats["ppo/behaviour/truncated"] == 0
    assert stats["ppo/loss/policy"] == pytest.approx(plain_step[0]["ppo/loss/policy"], abs=1e-3)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_changes_the_policy_loss_alone(name):
    settings = {"reuse_recorded": False, "prob_error_stop": None, "prob_error_warn": None}
    bounds = {
        "tis": (0.0, 1.1),
        "sequence_tis": (0.9, 2.0),
        "icepop": (0.9, 1.1),
        "dppo": (-1e-3, 1e-3),
        "clip": (0.9, 1.1),
    }.get(name)
    without, before = stepped(off=0.5, **settings, ppo_epochs=1, batch_size=6, minibatch_size=6)
    with_it, after = stepped(
        off=0.5,
        **settings,
        correction=name,
        correction_bounds=bounds,
        ppo_epochs=1,
        batch_size=6,
        minibatch_size=6,
    )
    assert with_it["ppo/loss/value"] == without["ppo/loss/value"]
    assert with_it["ppo/loss/policy"] != without["ppo/loss/policy"]
    assert not all(map(torch.equal, before, after))
    touched = with_it["ppo/behaviour/masked"] + with_it["ppo/behaviour/truncated"]
    assert 0 < touched <= 1


def test_the_gate_warns_and_stops_before_anything_is_changed():
    settings = {"reuse_recorded": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prob_error_warn")
        stats, _ = stepped(off=0.02, **settings)
    assert 1 < stats["ppo/behaviour/token_mult_prob_error"] < 1.05
    with pytest.warns(UserWarning, match="`prob_error_warn` 1.05"):
        stepped(off=0.11, **settings)
    with pytest.raises(RuntimeError, match=r"`prob_error_stop` must be at least 1\.\d+, or None"):
        stepped(off=0.5, **settings)
    with pytest.raises(RuntimeError, match="got 1.01"):
        stepped(off=0.1, **settings, prob_error_stop=1.01)
    stepped(off=0.5, **settings, prob_error_stop=None, prob_error_warn=None)


def test_the_ratio_is_the_policy_over_what_sampled():
    trainer = PPOTrainer(
        tiny_gpt2(1), tiny_gpt2(0), precision="fp32", reuse_recorded=False, prob_error_stop=None,
        prob_error_warn=None, correction="tis", ppo_epochs=1, minibatch_size=2,
    )  # fmt: skip
    rollout = Rollout.from_lists(ragged([3, 5]), ragged([4, 2], seed=5))
    logprobs = trainer.forward_pass(trainer.policy, rollout).logprobs
    stats = trainer.step(replace(rollout, behaviour_logprobs=logprobs - 0.5), [1.0, -1.0])
    assert stats["ppo/behaviour/weight"] == pytest.approx(math.exp(0.5), rel=1e-4)


def test_what_does_not_say_who_sampled_it_is_not_corrected():
    trainer = PPOTrainer(tiny_gpt2(1), tiny_gpt2(0), precision="fp32", correction="tis")
    with pytest.raises(ValueError, match="`correction` must be None for responses that do not say"):
        trainer.step(ragged([3, 5]), ragged([4, 2], seed=5), [1.0, -1.0])


def test_a_stopped_step_leaves_the_trainer_as_it_was():
    trainer = PPOTrainer(tiny_gpt2(1), tiny_gpt2(0), precision="fp32", reuse_recorded=False)
    rollout = Rollout.from_lists(ragged([3, 5]), ragged([4, 2], seed=5))
    before = [weight.clone() for weight in trainer.model.parameters()]
    state = trainer.small_state()
    stale = replace(rollout, behaviour_logprobs=torch.full((2, 4), -1.0))
    with pytest.raises(RuntimeError, match="prob_error_stop"):
        trainer.step(stale, [1.0, -1.0])
    assert all(map(torch.equal, before, trainer.model.parameters()))
    for name, part in trainer.small_state().items():
        same = torch.equal(part, state[name]) if isinstance(part, Tensor) else part == state[name]
        assert same, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction_bounds": [0.5, 2.0]}, "`correction_bounds` must be None without"),
        ({"correction": "tis", "correction_bounds": [1.5, 2.0]}, "must hold 1, what is right"),
        ({"correction": "dppo", "correction_bounds": [0.5, 2.0]}, "must hold 0, what is right"),
        ({"correction": "vtrace"}, "must be one of tis, sequence_tis, icepop, dppo, clip, geom"),
        ({"prob_error_stop": 0.9}, "`prob_error_stop` must be a finite number > 1"),
    ],
)
def test_bad_corrections_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
