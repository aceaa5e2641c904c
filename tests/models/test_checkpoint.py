"""Folders: what is written, what is replaced, and what is refused."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from tests.conftest import tiny_gpt2
from tests.families import tiny_model
from tests.models.policies import TOKENS, lora_policy, with_values
from trl.gpt2 import GPT2HeadWithValueModel
from trl.models.checkpoint import OLDER_HEAD_FILE, VALUE_HEAD_FILE
from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead, load_policy

LOADERS = [
    CausalLMWithValueHead.from_pretrained,
    Seq2SeqLMWithValueHead.from_pretrained,
    GPT2HeadWithValueModel.from_pretrained,
    load_policy,
]
SHARDS = {"max_shard_size": "20KB"}


def policies():
    return [with_values(CausalLMWithValueHead(tiny_model("llama"))), tiny_gpt2()]


def same(first, second):
    with torch.no_grad():
        one, other = first(input_ids=TOKENS), second(input_ids=TOKENS)
    return torch.equal(one.logits, other.logits) and torch.equal(one.value, other.value)


def change(policy):
    for weight in policy.parameters():
        weight.data.mul_(1.5)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_last_save_is_loaded_however_many_files_it_has(index, tmp_path):
    policy = policies()[index]
    for settings in ({}, SHARDS, {}, SHARDS, {}):
        change(policy)
        policy.save_pretrained(tmp_path, **settings)
        assert same(type(policy).from_pretrained(tmp_path), policy)
        assert (tmp_path / "model.safetensors").exists() == (not settings)
        assert (tmp_path / "model.safetensors.index.json").exists() == bool(settings)


def test_a_save_that_fails_deletes_nothing(tmp_path, monkeypatch):
    policy = policies()[0]
    policy.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", None)
    with pytest.raises(TypeError):
        policy.save_pretrained(tmp_path, **SHARDS)
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path), policy)


@pytest.mark.parametrize("index", [0, 1])
def test_a_whole_model_is_not_saved_over_an_adapter(index, tmp_path):
    adapted = lora_policy(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"must not hold an adapter .* delete the adapter_\* fil"):
        policies()[index].save_pretrained(tmp_path / "adapter")
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), adapted)


# -- the value head --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, SHARDS])
@pytest.mark.parametrize("load", [CausalLMWithValueHead, GPT2HeadWithValueModel])
def test_a_head_beside_weights_of_another_model_is_left_out(load, settings, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    torch.manual_seed(5)
    plain = GPT2LMHeadModel(tiny_gpt2().config)
    for file in tmp_path.glob("model*"):
        file.unlink()
    plain.save_pretrained(tmp_path, **settings)
    with pytest.warns(UserWarning, match=r"head.safetensors` is left out, .* starts anew"):
        model = load.from_pretrained(tmp_path)
    assert model.v_head.summary.weight.abs().max() == 0
    assert torch.equal(model.get_input_embeddings().weight, plain.transformer.wte.weight)


def test_a_head_is_kept_when_its_weights_are_spread_over_other_files(tmp_path):
    policy = policies()[0]
    policy.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    policy.language_model.save_pretrained(tmp_path, **SHARDS)
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path), policy)


def test_one_weight_that_moved_is_enough(tmp_path):
    policy = with_values(CausalLMWithValueHead(tiny_model("llama"), unfrozen_layers=1))
    policy.save_pretrained(tmp_path)
    policy.language_model.model.layers[-1].mlp.down_proj.weight.data.add_(1e-6)
    policy.language_model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is left out"):
        CausalLMWithValueHead.from_pretrained(tmp_path)


def test_an_adapter_saved_by_peft_over_ours_leaves_its_head_out(tmp_path):
    policy = lora_policy(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapter")
    change(policy)
    policy.pretrained_model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="is left out"):
        again = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert again.v_head.summary.weight.abs().max() == 0


@pytest.mark.parametrize("settings", [{}, SHARDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_beside_its_own_weights_is_kept_at_any_precision(settings, dtype, tmp_path):
    policy = with_values(CausalLMWithValueHead(tiny_model("llama").to(dtype)))
    policy.save_pretrained(tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loaded in (None, torch.float32, torch.bfloat16):
            chosen = {} if loaded is None else {"dtype": loaded}
            again = CausalLMWithValueHead.from_pretrained(tmp_path, **chosen)
            assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)


def test_a_head_that_does_not_know_its_weights_is_loaded(tmp_path):
    policy = policies()[0]
    policy.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / VALUE_HEAD_FILE), tmp_path / VALUE_HEAD_FILE)
    tiny_model("llama", seed=5).save_pretrained(tmp_path)
    again = CausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "weights",
    [
        {"summary.weight": torch.zeros(1, 16), "summary.bias": torch.zeros(1)},
        {"summary.weight": torch.zeros(1, 32)},
        {"summary.weight": torch.zeros(1, 32), "summary.bias": torch.zeros(1), "x": torch.ones(1)},
        {},
    ],
)
def test_a_value_head_of_another_kind_is_named(index, weights, tmp_path):
    policy = policies()[index]
    policy.save_pretrained(tmp_path)
    save_file(weights, tmp_path / VALUE_HEAD_FILE)
    message = r'head.safetensors` must fit the model, .*(summary|"x").* delete'
    with pytest.raises(ValueError, match=message):
        type(policy).from_pretrained(tmp_path)


def test_a_file_that_is_no_value_head_is_named(tmp_path):
    policies()[0].save_pretrained(tmp_path)
    (tmp_path / VALUE_HEAD_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=r"head.safetensors` must be a safetensors file"):
        CausalLMWithValueHead.from_pretrained(tmp_path)


def test_the_head_is_where_engines_do_not_look_and_older_folders_load(tmp_path):
    policy = policies()[0]
    before = os.umask(0o027)
    try:
        policy.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    for name in ("model.safetensors", VALUE_HEAD_FILE):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    saved = {(tmp_path / VALUE_HEAD_FILE).read_bytes()}
    (tmp_path / VALUE_HEAD_FILE).rename(tmp_path / OLDER_HEAD_FILE)
    assert same(CausalLMWithValueHead.from_pretrained(tmp_path), policy)
    for _ in range(8):
        policy.save_pretrained(tmp_path)
        saved.add((tmp_path / VALUE_HEAD_FILE).read_bytes())
    assert len(saved) == 1
    assert not (tmp_path / OLDER_HEAD_FILE).exists()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["{}/nope", "./nope", "../nope", "~/nope", "runs/nope/last"])
def test_a_missing_folder_is_named(load, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the model folder `.*` does not exist: pass"):
        load(name.format(tmp_path))


@pytest.mark.parametrize("index", [0, 1])
def test_the_home_folder_is_written_out(index, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    policy = policies()[index]
    policy.save_pretrained("~/policy")
    assert (tmp_path / "policy" / VALUE_HEAD_FILE).exists()
    assert same(type(policy).from_pretrained("~/policy"), policy)
    assert same(load_policy("~/policy"), policy)


@pytest.mark.parametrize("index", [0, 1])
def test_a_file_is_no_folder(index, tmp_path):
    (tmp_path / "file").write_text("x")
    policy = policies()[index]
    with pytest.raises(FileExistsError, match="`save_directory` must be a folder, got the file"):
        policy.save_pretrained(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="file` is a file: pass a folder"):
        type(policy).from_pretrained(tmp_path / "file")


def test_gpt2_does_not_load_an_adapter(tmp_path):
    changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    lora_policy(tmp_path / "base", "gpt2", **changes).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"got an adapter .* trl.CausalLMWithValueHead"):
        GPT2HeadWithValueModel.from_pretrained(tmp_path / "adapter")


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_policy_is_not_wrapped_twice(index):
    policy = policies()[index]
    assert load_policy(policy) is policy
    for wrap in (CausalLMWithValueHead, CausalLMWithValueHead.from_pretrained):
        with pytest.raises(TypeError, match=r"without a value head, got .*: use it as it is"):
            wrap(policy)


@pytest.mark.parametrize("load", [CausalLMWithValueHead.from_pretrained, load_policy])
def test_a_misspelt_argument_is_named(load, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    for name in ("unfrozen_layer", "output_loading_info"):
        with pytest.raises(TypeError, match=f"keyword argument '{name}'"):
            load(tmp_path, **{name: 1})
