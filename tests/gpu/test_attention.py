"""Kinds of attention, and which kernels run where."""

import pytest
import torch

from tests.conftest import ragged
from tests.families import tiny_model
from tests.gpu.devices import only_on_cuda
from tests.gpu.policies import SCORES, SETTINGS, VOCABULARY, batch
from tests.models.policies import with_values
from trl.models.with_value_head import CausalLMWithValueHead
from trl.ppo import PPOTrainer
from trl.rollout import Sampler


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def policy_of(folder, attention):
    torch.manual_seed(0)
    return with_values(CausalLMWithValueHead.from_pretrained(folder, attn_implementation=attention))


def test_sdpa_gives_the_logprobs_of_attention_written_out(folder, device):
    found = []
    for attention in ("eager", "sdpa"):
        trainer = PPOTrainer(policy_of(folder, attention), **SETTINGS)
        rollout = batch().to(device)
        found.append(trainer.forward_pass(trainer.policy, rollout).logprobs)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@only_on_cuda("flash attention has no other kernels")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_flash_attention_samples_and_trains_near_attention_written_out(folder, algorithm):
    pytest.importorskip("flash_attn", reason="the package flash_attn is not installed")
    stats = []
    for attention in ("eager", "flash_attention_2"):
        policy = policy_of(folder, attention)
        trainer = PPOTrainer(policy, **SETTINGS | {"precision": "bf16", "algorithm": algorithm})
        with trainer.sampling():
            Sampler(max_new_tokens=6, group_size=2)(policy, ragged([3, 6], 0, VOCABULARY))
        stats.append(trainer.step(batch(), SCORES))
    exact, flash = stats
    for name in ("objective/entropy", "ppo/policy/entropy"):
        assert flash[name] == pytest.approx(exact[name], rel=0.02), name
    assert flash["ppo/first_log_ratio"] < 0.02


@only_on_cuda("on the CPU they are meant to be used")
def test_kernels_for_the_cpu_stay_there(folder):
    """Also for a policy that was loaded on the CPU, as all are, and moved by the trainer."""
    trainer = PPOTrainer(policy_of(folder, "sdpa"), **SETTINGS)
    with trainer.updater.responder.quick.in_use():
        assert trainer.model.config._attn_implementation == "sdpa"
