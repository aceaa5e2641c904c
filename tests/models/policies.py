"""Policies and a rollout for the tests of this folder."""

import pytest
import torch
from peft import LoraConfig

from tests.conftest import ragged
from tests.families import VOCABULARY, tiny_model
from trl.batch import Rollout
from trl.compute.updater import ManyProcesses
from trl.compute.working_weights import WorkingWeights
from trl.models.with_value_head import CausalLMWithValueHead
from trl.ppo import PPOTrainer

TOKENS = torch.arange(10).view(2, 5)
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def ragged_rollout():
    return Rollout.from_lists(
        ragged([2, 7, 4], vocabulary=VOCABULARY), ragged([5, 1, 3], 1, VOCABULARY)
    )


def with_values(policy):
    """The policy with a value head that is not zero."""
    torch.nn.init.normal_(policy.v_head.summary.weight, std=0.1)
    return policy


def lora_config(**changes):
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj", "down_proj"]} | LORA | changes)


def lora_policy(folder, family="llama", **changes):
    """A model with a random adapter, and a value head that is not zero."""
    tiny_model(family).save_pretrained(folder)
    return with_values(
        CausalLMWithValueHead.from_pretrained(folder, peft_config=lora_config(**changes))
    )


def trainer_of(policy, ref_model=None, **settings):
    defaults = {"batch_size": 3, "minibatch_size": 3, "learning_rate": 1e-2, "precision": "fp32"}
    return PPOTrainer(policy, ref_model, **defaults | settings)


def trainer_against_base(policy, **settings):
    """The KL measured against the model without its adapter, which is trained already."""
    with pytest.warns(UserWarning, match="does not start at its reference"):
        return trainer_of(policy, "adapters-off", **settings)


def step(trainer):
    return trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])


def leave_to_autograd(trainer):
    """Without working copies; autograd makes every gradient, as with many processes."""
    trainer.updater.__class__ = ManyProcesses
    trainer.updater._working = WorkingWeights(trainer.model, None)
