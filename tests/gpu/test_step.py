"""A step on the GPU is the step on the CPU, up to rounding; and at low precision near it.

Tolerance in float32: 1e-3 of the change of the weights, and of a figure. Sums in another order
change a gradient by some 1e-6 of its size, which whitening and a few updates make larger.
"""

import math

import numpy as np
import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from tests.gpu.devices import CPU, only_on_cuda, trainers_on
from tests.gpu.policies import (
    PAIRS,
    SCORES,
    SETTINGS,
    VOCABULARY,
    batch,
    made,
    trainer_by_sgd,
    weights_of,
)
from trl.ppo import PPOTrainer
from trl.rollout import Sampler

WAYS = {
    "one minibatch": {"minibatch_size": 8, "forward_batch_size": None},
    "passes by tokens": {"forward_batch_size": None, "token_budget": 20},
    "whitened": {"whiten_rewards": True, "center_scores": True, "scale_scores": True},
    "grpo": {"algorithm": "grpo"},
    "rloo": {"algorithm": "rloo", "scale_scores": True, "missing_eos_penalty": 1.0},
    "reinforce++": {"algorithm": "reinforce++"},
    "warm-up": {"value_warmup_steps": 1, "vf_coef": 1.0},
    "pretraining": {"pretraining_coef": 0.5, "pretraining_rows": 4},
}


def steps(pair, device, number=2, **settings):
    """Before and after some steps: the weights; and the figures of the last, and the trainer."""
    policy, reference, _ = PAIRS[pair]
    policy, reference = policy(), reference() if reference else None
    before = weights_of(policy)
    with trainers_on(device):
        trainer = trainer_by_sgd(policy, reference, **settings)
        if "pretraining_coef" in settings:
            trainer.pretraining = lambda rows: ragged([2, 6, 3, 5][:rows], 2, VOCABULARY)
        for _ in range(number):
            stats = trainer.step(batch(), SCORES)
        assert {weight.device.type for weight in policy.parameters()} == {device.type}
    return before, weights_of(policy), stats, trainer


def assert_same_steps(ours, theirs, tolerance=1e-3):
    (before, weights, stats, _), (_, other_weights, other_stats, _) = ours, theirs
    change = (weights - before).norm()
    assert change > 0
    assert (weights - other_weights).norm() <= tolerance * change
    assert stats.keys() == other_stats.keys()
    for name, value in stats.items():
        if isinstance(value, float) and not name.startswith("time/"):
            assert other_stats[name] == pytest.approx(value, rel=tolerance, abs=1e-5), name


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_change_the_weights_as_on_the_cpu(pair, device):
    on_cpu, here = steps(pair, CPU), steps(pair, device)
    assert here[-1].reference.kind == PAIRS[pair][2]
    assert_same_steps(on_cpu, here)


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_all_kinds_are_those_on_the_cpu(way, device):
    pair = "gpt2 and another"
    assert_same_steps(steps(pair, CPU, **WAYS[way]), steps(pair, device, **WAYS[way]))


@pytest.mark.parametrize("pair", ["llama and a copy", "a shared trunk"])
def test_prompts_that_are_shared_are_computed_once_here_too(pair, device):
    assert steps(pair, device, number=1, algorithm="grpo")[-1].own.packs


def test_what_is_passed_may_lie_on_several_devices(device):
    """Queries from a tokenizer, responses from a model, scores from another."""
    rollout = batch()
    queries = [row[mask] for row, mask in zip(rollout.queries, rollout.query_mask, strict=True)]
    responses = [
        row[mask] for row, mask in zip(rollout.responses, rollout.response_mask, strict=True)
    ]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in responses]
    kl = []
    for moved in (None, "queries", "responses", "scores", "masks"):
        parts = {"queries": queries, "responses": responses, "masks": masks}
        if moved in parts:
            parts[moved] = [row.to(device) for row in parts[moved]]
        scores = torch.tensor(SCORES).to(device if moved == "scores" else CPU)
        stats = PPOTrainer(made("gpt2"), tiny_gpt2(1), **SETTINGS).step(
            parts["queries"], parts["responses"], scores, response_masks=parts["masks"]
        )
        kl.append(stats["objective/kl"])
    assert kl == pytest.approx([kl[0]] * len(kl), rel=1e-5)


def test_the_example_of_2020_runs(device):
    """As in the README, which says nothing of devices."""
    from trl.gpt2 import respond_to_batch

    model, reference = tiny_gpt2(0), tiny_gpt2(1)
    trainer = PPOTrainer(model, reference, batch_size=1, forward_batch_size=1)
    query = torch.tensor([[5, 3, 8]])
    response = respond_to_batch(model, query)
    assert response.device.type == device.type
    assert math.isfinite(trainer.step(query, response, torch.tensor([1.0]))["ppo/loss/total"])


def test_scores_for_single_tokens(device):
    scores = torch.arange(64.0).view(8, 8) / 64
    found = []
    for where in (CPU, device):
        with trainers_on(where):
            trainer = trainer_by_sgd(made("gpt2"), tiny_gpt2(1))
            found.append(trainer.step(batch(), scores)["ppo/returns/mean"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_equal_models_have_no_kl(device):
    """Both run the same kernels: even rounding is the same."""
    stats = PPOTrainer(made("gpt2"), **SETTINGS).step(batch(), SCORES)
    assert np.abs(stats["objective/kl_dist"]).max() == 0


# --- low precision --------------------------------------------------------------------------------

LOW = [
    "bf16",
    pytest.param("fp16", marks=only_on_cuda("fp16 has no use on a CPU")),
]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("precision", LOW)
def test_the_first_ratio_at_low_precision_is_near_1(precision, family, recorded, device):
    policy = made(family)
    trainer = PPOTrainer(policy, **SETTINGS | {"precision": precision, "reuse_recorded": recorded})
    with trainer.sampling():
        rollout = Sampler(max_new_tokens=8, group_size=4)(policy, ragged([3, 6], 0, VOCABULARY))
    stats = trainer.step(rollout, SCORES)
    assert stats["ppo/first_log_ratio"] < 0.02
    assert math.isfinite(stats["ppo/loss/total"])
    assert stats["ppo/updates"] + stats["ppo/skipped_updates"] == 4
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", LOW)
def test_the_gradient_at_low_precision_points_where_that_of_fp32_does(precision, device):
    once = {"number": 1, "minibatch_size": 8, "ppo_epochs": 1}
    before, exact, _, _ = steps("gpt2 and another", device, **once)
    _, rounded, _, _ = steps("gpt2 and another", device, precision=precision, **once)
    cosine = torch.cosine_similarity(exact - before, rounded - before, dim=0)
    assert cosine > 0.99


@only_on_cuda("fp16 has no use on a CPU")
def test_the_scale_of_fp16_is_saved_and_loaded(tmp_path):
    settings = SETTINGS | {"precision": "fp16"}
    trainer = PPOTrainer(made("gpt2"), tiny_gpt2(1), **settings)
    trainer.step(batch(), SCORES)
    trainer.accelerator.scaler.update(512.0)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 512.0

    other = PPOTrainer(made("gpt2"), tiny_gpt2(1), **settings)
    other.load_state_dict(state)
    assert other.accelerator.scaler.get_scale() == 512.0
    assert math.isfinite(other.step(batch(), SCORES)["ppo/loss/total"])
    exact = PPOTrainer(made("gpt2"), tiny_gpt2(1), **SETTINGS)
    with pytest.raises(ValueError, match="same precision"):
        exact.load_state_dict(state)


@only_on_cuda("fp16 has no use on a CPU")
def test_an_update_that_overflows_at_fp16_is_skipped_and_counted_as_such():
    trainer = PPOTrainer(made("gpt2"), tiny_gpt2(1), **SETTINGS | {"precision": "fp16"})
    scaler = trainer.accelerator.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})
    before = weights_of(trainer.model)
    stats = trainer.step(batch(), SCORES)
    assert torch.equal(weights_of(trainer.model), before)
    assert (stats["ppo/updates"], stats["ppo/skipped_updates"]) == (0, 4)
    assert scaler.get_scale() < 2.0**100
