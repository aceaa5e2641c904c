"""bfloat16 is for what is frozen; what is trained is float32, and moves."""

import copy

import pytest
import torch

from tests.conftest import ragged
from tests.families import tiny_model
from trl.config import SettingsError, build
from trl.config.recipe import Recipe
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.rollout import Sampler

QUERIES = ragged([3, 4, 5, 2], vocabulary=60)
SCORES = torch.tensor([1.0, -1.0, 0.0, 2.0])


def how(kind, folder):
    if kind == "top":
        return {"unfrozen_layers": 1}
    peft = pytest.importorskip("peft")
    turned = "gpt2" in folder.name  # its matrices
    config = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=turned)
    return {"peft_config": config}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["adapter", "top"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_may_be_bfloat16(folder, kind, precision):
    policy = load_policy(folder, dtype="bfloat16", **how(kind, folder))
    before = copy.deepcopy(dict(policy.named_parameters()))
    trainer = PPOTrainer(policy, batch_size=4, minibatch_size=2, precision=precision)
    with trainer.sampling():
        rollout = Sampler(max_new_tokens=5, add_bos=False)(policy, QUERIES)
    own = trainer.forward_pass(trainer.policy, rollout).logprobs
    exact = trainer.forward_pass(PPOTrainer(load_policy(folder)).policy, rollout).logprobs
    assert (own - exact).abs().mean() < 0.05
    assert trainer.step(rollout, SCORES)["ppo/policy/approxkl"] > 0
    moved = 0
    for name, weight in policy.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name
        if not weight.requires_grad:
            assert torch.equal(weight, before[name]), name
        moved += not torch.equal(weight, before[name])
    assert moved > 1


def test_a_recipe_refuses_it_where_all_is_trained():
    with pytest.raises(SettingsError, match=r"`model.dtype` must be float32 where all weights"):
        build(Recipe, {"model": {"dtype": "bfloat16"}})
    build(Recipe, {"model": {"dtype": "bfloat16", "unfrozen_layers": 1}})
    with pytest.raises(SettingsError, match=r"`model.gguf_file` must be None for the model that"):
        build(Recipe, {"model": {"gguf_file": "a.gguf"}})
