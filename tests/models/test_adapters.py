"""Adapters: what is trained, what is saved, and what is refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import tiny_model
from tests.models.policies import (
    TOKENS,
    lora_config,
    lora_policy,
    ragged_rollout,
    step,
    trainer_against_base,
    trainer_of,
    with_values,
)
from trl.models.adapters import base_of, base_weights
from trl.models.checkpoint import ADAPTER_FILE, VALUE_HEAD_FILE, Source
from trl.models.response import ResponseModel
from trl.models.with_value_head import CausalLMWithValueHead, load_policy


def same(first, second):
    """Whether two policies answer alike, to the bit."""
    with torch.no_grad():
        one, other = first(input_ids=TOKENS), second(input_ids=TOKENS)
    return torch.equal(one.logits, other.logits) and torch.equal(one.value, other.value)


def trained(policy):
    return {name for name, weight in policy.named_parameters() if weight.requires_grad}


# -- reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", [None, "adapters-off"])
def test_biases_of_the_base_that_are_trained_are_refused(bias, kind):
    config = lora_config(target_modules=["q_proj"], bias=bias)
    policy = CausalLMWithValueHead.from_pretrained(tiny_model("qwen2"), peft_config=config)
    with pytest.raises(ValueError, match=r"q_proj.base_layer.bias` has .* bias='none'.*='copy'"):
        trainer_of(policy, kind)
    trainer = trainer_of(policy, "copy")
    expected = ResponseModel(policy)(ragged_rollout()).logprobs.detach()
    for _ in range(2):
        stats = step(trainer)
        assert torch.equal(torch.from_numpy(stats["objective/ref_logprobs"]), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": [], "target_parameters": ["lm_head.weight"]},
    ],
)
def test_what_an_adapter_trains_is_not_the_bases(changes):
    base = tiny_model("llama")
    expected = ResponseModel(base)(ragged_rollout()).logprobs.detach()
    weights = {id(weight) for weight in base.parameters()}
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(**changes))
    assert {id(weight) for _, weight in base_weights(policy.language_model)} <= weights
    trainer = trainer_against_base(policy)
    for _ in range(2):
        stats = step(trainer)
        assert torch.equal(torch.from_numpy(stats["objective/ref_logprobs"]), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # random, as one that was trained
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "use_dora": True},
    ],
)
def test_the_reference_is_where_the_policy_starts(changes, precision):
    """Without its adapter it is another model: the KL at the start was 2 to 7 nats."""
    policy = CausalLMWithValueHead.from_pretrained(
        tiny_model("llama"), peft_config=lora_config(**changes)
    )
    expected = ResponseModel(policy)(ragged_rollout()).logprobs.detach()
    trainer = trainer_of(policy, precision=precision)
    assert trainer.reference.kind == "adapter-at-start"
    stats = step(trainer)
    assert stats["objective/kl"] == 0
    rounding = {"atol": 1e-5, "rtol": 0} if precision == "fp32" else {"atol": 0.1, "rtol": 0}
    for _ in range(2):
        again = step(trainer)
        found = torch.from_numpy(again["objective/ref_logprobs"])
        torch.testing.assert_close(found, expected, **rounding)
        assert torch.equal(found, torch.from_numpy(stats["objective/ref_logprobs"]))
    assert again["objective/kl"] != 0


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        # Of tokens that are not among the few that logits are compared on.
        (TrainableTokensConfig(token_indices=[30, 31], target_modules=["embed_tokens"]), 0.5),
        (lora_config(init_lora_weights=True), 1e-6),
    ],
)
def test_an_adapter_that_has_hardly_changed_anything_is_not_called_fresh(config, trained):
    policy = CausalLMWithValueHead(get_peft_model(tiny_model("llama"), config))
    assert trainer_of(copy.deepcopy(policy)).reference.kind == "adapters-off"
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += trained
    trainer = trainer_of(policy)
    assert trainer.reference.kind == "adapter-at-start"
    assert step(trainer)["objective/kl"] == 0


def test_an_adapter_on_an_adapter_starts_where_the_first_one_is():
    first = get_peft_model(tiny_model("llama"), lora_config())
    merged = first.merge_and_unload()
    fresh = CausalLMWithValueHead.from_pretrained(
        merged, peft_config=lora_config(init_lora_weights=True)
    )
    assert trainer_of(fresh).reference.kind == "adapters-off"
    both = get_peft_model(tiny_model("llama"), lora_config(), "first")
    both.add_adapter("second", lora_config(init_lora_weights=True))
    both.base_model.set_adapter(["first", "second"])
    for name, weight in both.named_parameters():
        weight.requires_grad_(".second." in name)
    trainer = trainer_of(CausalLMWithValueHead(both))
    assert trainer.reference.kind == "adapter-at-start"
    assert step(trainer)["objective/kl"] == 0


def test_a_frozen_adapter_stays_frozen(tmp_path):
    lora_policy(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    policy = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=False)
    before = trained(policy)
    step(trainer_of(policy))
    assert trained(policy) == before == {"v_head.summary.weight", "v_head.summary.bias"}


def test_an_adapter_that_is_switched_off_is_refused(tmp_path):
    policy = lora_policy(tmp_path)
    policy.pretrained_model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"must have its adapter switched on.*q_proj` off"):
        trainer_of(policy)


# -- save ------------------------------------------------------------------------------------------


def test_an_adapter_of_another_name_is_saved_where_it_is_looked_for(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = with_values(CausalLMWithValueHead(get_peft_model(base, lora_config(), "rl")))
    policy.save_pretrained(tmp_path / "adapter")
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), policy)
    assert not (tmp_path / "adapter" / "rl").exists()


def test_several_adapters_are_named(tmp_path):
    policy = lora_policy(tmp_path / "base")
    policy.pretrained_model.add_adapter("other", lora_config())
    with pytest.raises(ValueError, match=r"one adapter, got \['default', 'other'\]"):
        policy.save_pretrained(tmp_path / "adapter")
    policy.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), policy)


def test_an_adapter_is_not_saved_into_the_folder_of_its_base(tmp_path, monkeypatch):
    policy = lora_policy(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be another folder than that of the base model"):
        policy.save_pretrained("base")
    policy.pretrained_model.save_pretrained(tmp_path / "base")
    for load in (CausalLMWithValueHead.from_pretrained, load_policy):
        with pytest.raises(ValueError, match=r"must be a whole model, got .*move the adapter_\*"):
            load(tmp_path / "base")


# -- load ------------------------------------------------------------------------------------------


def test_a_pickled_adapter_is_loaded_only_if_allowed(tmp_path):
    policy = lora_policy(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / ADAPTER_FILE).unlink()
    (tmp_path / "adapter" / VALUE_HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle.* allow_pickle=True"):
        CausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    again = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter", allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, policy(TOKENS).logits)


def test_an_adapter_in_a_subfolder_loads(tmp_path):
    policy = lora_policy(tmp_path / "base")
    policy.save_pretrained(tmp_path / "run" / "step-1")
    for load in (CausalLMWithValueHead.from_pretrained, load_policy):
        assert same(load(tmp_path / "run", subfolder="step-1"), policy)


def test_the_revision_of_the_base_is_the_adapters(tmp_path):
    lora_policy(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    config.revision = "v1"
    config.save_pretrained(tmp_path / "adapter")
    adapter = Source(
        str(tmp_path / "adapter"), {"revision": "main", "subfolder": ".", "token": "t"}
    )
    base, settings = base_of(adapter, {"dtype": "auto"})
    assert base == Source(str(tmp_path / "base"), {"revision": "v1", "token": "t"})
    assert settings == {"dtype": "auto"}


def test_a_base_that_is_missing_is_named(tmp_path):
    lora_policy(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="base` does not exist"):
        load_policy(tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: one weight at both ends
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft says that it saves embeddings
def test_an_adapter_on_a_model_with_added_tokens_comes_back(family, changes, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    policy = with_values(
        CausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(**changes))
    )
    policy.save_pretrained(tmp_path / "adapter")
    again = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert same(again, policy)
    assert again.config.vocab_size == 70


def test_added_tokens_that_peft_would_not_save_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    config = lora_config(target_modules=["q_proj", "embed_tokens"])
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=config)
    with pytest.raises(ValueError, match=r"has 70 tokens and its base .* 61.*save the base model"):
        policy.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_without_a_head_takes_its_bases(tmp_path):
    base = with_values(CausalLMWithValueHead(tiny_model("llama")))
    base.save_pretrained(tmp_path / "base")
    policy = CausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora_config())
    policy.pretrained_model.save_pretrained(tmp_path / "adapter")  # peft's own, without a head
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), policy)
    policy.v_head.summary.weight.data.mul_(2)
    policy.save_pretrained(tmp_path / "adapter")
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), policy)


# -- arguments -------------------------------------------------------------------------------------


def test_what_is_no_configuration_of_an_adapter_is_named():
    with pytest.raises(TypeError, match=r"`peft_config` must be a configuration .* got dict"):
        CausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config={"r": 4})


def test_a_loaded_adapter_is_frozen_by_the_caller():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"\['is_trainable'\] must be left out with a loaded model"):
        CausalLMWithValueHead.from_pretrained(model, is_trainable=False)


def test_code_of_a_folder_is_trusted_for_its_configuration_too(tmp_path):
    policy = with_values(CausalLMWithValueHead(tiny_model("llama")))
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    assert same(load_policy(tmp_path, trust_remote_code=True), policy)
    given = load_policy(tmp_path, config=policy.config)
    assert same(given, policy)
