"""Loading and saving; adapters; frozen layers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_gpt2
from tests.families import tiny_model
from tests.models.policies import (
    LORA,
    TOKENS,
    lora_policy,
    ragged_rollout,
    trainer_against_base,
)
from trl.gpt2 import GPT2HeadWithValueModel
from trl.models.checkpoint import VALUE_HEAD_FILE
from trl.models.response import ResponseModel
from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead
from trl.ppo import PPOTrainer

OLD_FOLDERS = Path(__file__).parents[1] / "data" / "old-folders"


# -- output ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_output_has_names_and_unpacks_with_the_value_last():
    policy = CausalLMWithValueHead(tiny_model("llama"))
    output = policy(input_ids=TOKENS)
    logits, past, value = output
    assert output.logits is logits
    assert output.past_key_values is past
    assert output.value is value
    assert value.shape == (2, 5)
    assert value.dtype == torch.float32
    assert (value == 0).all()  # as at the start of training


@torch.no_grad()
def test_what_a_family_returns_besides_keeps_its_name():
    output = Seq2SeqLMWithValueHead(tiny_model("bart"))(input_ids=TOKENS, decoder_input_ids=TOKENS)
    assert output.encoder_last_hidden_state.shape == (2, 5, 32)
    assert tuple(output)[-1] is output.value


def test_generate_is_the_plain_models():
    plain = tiny_model("llama")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(
        CausalLMWithValueHead(plain).generate(TOKENS, **settings),
        plain.generate(TOKENS, **settings),
    )


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        (CausalLMWithValueHead, lambda: tiny_model("bart"), "use Seq2SeqLMWithValueHead"),
        (Seq2SeqLMWithValueHead, lambda: tiny_model("llama"), "use CausalLMWithValueHead"),
        (CausalLMWithValueHead, lambda: torch.nn.Linear(2, 2), "got Linear"),
        (CausalLMWithValueHead, lambda: tiny_model("llama").model, "got LlamaModel"),
    ],
)
def test_another_kind_of_model_is_named(kind, model, message):
    with pytest.raises(TypeError, match=message):
        kind(model())


def test_a_folder_of_another_kind_is_named(tmp_path):
    tiny_model("bart").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="use Seq2SeqLMWithValueHead"):
        CausalLMWithValueHead.from_pretrained(tmp_path)


# -- old folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CausalLMWithValueHead, GPT2HeadWithValueModel])
@pytest.mark.parametrize("name", ["trl-0.0.3", "trl-0.11-pickle", "trl-0.11-safetensors"])
@torch.no_grad()
def test_folders_of_older_releases_load(name, kind, caplog):
    folder = OLD_FOLDERS / name
    pickled = not (folder / "model.safetensors").exists()
    if pickled:
        with pytest.raises(ValueError, match=r"a pickle.* allow_pickle=True"):
            kind.from_pretrained(folder)
    caplog.clear()
    model = kind.from_pretrained(folder, allow_pickle=pickled).eval()
    assert not caplog.records
    expected = load_file(OLD_FOLDERS / "expected" / f"{folder.name}.safetensors")
    output = model(input_ids=TOKENS)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.value, expected["value"].view(2, 5), rtol=1e-5, atol=1e-6)
    assert output.value.abs().max() > 0.1


@torch.no_grad()
def test_an_encoder_decoder_folder_of_release_0_11_loads():
    model = Seq2SeqLMWithValueHead.from_pretrained(OLD_FOLDERS / "trl-0.11-t5")
    expected = load_file(OLD_FOLDERS / "expected" / "trl-0.11-t5.safetensors")
    output = model(input_ids=TOKENS, decoder_input_ids=TOKENS.flip(0))
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.value, expected["value"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_lora_folder_of_release_0_11_loads(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(OLD_FOLDERS / "trl-0.11-lora", folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(OLD_FOLDERS / "base")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="value head in pytorch_model.bin, a pickle"):
        CausalLMWithValueHead.from_pretrained(folder)
    model = CausalLMWithValueHead.from_pretrained(folder, allow_pickle=True)
    expected = load_file(OLD_FOLDERS / "expected" / "trl-0.11-lora.safetensors")
    output = model(input_ids=TOKENS)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.value, expected["value"], rtol=1e-5, atol=1e-6)


# -- save and load ---------------------------------------------------------------------------------


@torch.no_grad()
def test_shards_load_and_the_head_stands_beside_them(tmp_path):
    policy = CausalLMWithValueHead(tiny_model("llama"))
    torch.nn.init.normal_(policy.v_head.summary.weight)
    policy.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = CausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=TOKENS).logits, policy(input_ids=TOKENS).logits)
    assert torch.equal(again(input_ids=TOKENS).value, policy(input_ids=TOKENS).value)


def test_our_gpt2_folder_and_the_general_class_read_each_other(tmp_path):
    gpt2 = tiny_gpt2()
    gpt2.save_pretrained(tmp_path / "a")
    general = CausalLMWithValueHead.from_pretrained(tmp_path / "a")
    assert torch.equal(general.v_head.summary.weight, gpt2.v_head.summary.weight)
    general.save_pretrained(tmp_path / "b")
    back = GPT2HeadWithValueModel.from_pretrained(tmp_path / "b")
    for (name, weight), (_, expected) in zip(
        back.named_parameters(), gpt2.named_parameters(), strict=True
    ):
        assert torch.equal(weight, expected), name


def test_settings_reach_transformers(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    policy = CausalLMWithValueHead.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert policy.language_model.dtype == torch.bfloat16
    assert policy.config._attn_implementation == "eager"
    assert policy.v_head.summary.weight.dtype == torch.float32


def test_push_to_hub_uploads_the_whole_folder(monkeypatch):
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        uploaded.update(
            repo_id=repo_id,
            files={str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")},
        )

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    CausalLMWithValueHead(tiny_model("llama")).push_to_hub("someone/policy")
    assert uploaded["repo_id"] == "someone/policy"
    assert {"config.json", "model.safetensors", VALUE_HEAD_FILE} <= uploaded["files"]


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "v_proj"], **LORA),
        LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True, **LORA),
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    ],
)
def test_with_the_adapter_off_the_policy_is_its_own_reference(config):
    base = tiny_model("llama")
    expected = ResponseModel(base)(ragged_rollout()).logprobs.detach()
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=config)
    trainer = trainer_against_base(policy)
    assert trainer.reference.kind == "adapters-off"
    frozen = {n: w.clone() for n, w in policy.named_parameters() if not w.requires_grad}
    stats = trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])
    assert torch.equal(torch.from_numpy(stats["objective/ref_logprobs"]), expected)
    changed = {
        n: not torch.equal(frozen[n], w) for n, w in policy.named_parameters() if n in frozen
    }
    assert len(changed) > 10
    assert not any(changed.values())
    again = trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])
    assert torch.equal(torch.from_numpy(again["objective/ref_logprobs"]), expected)
    assert not torch.equal(torch.from_numpy(again["objective/logprobs"]), expected)
    assert all(w.requires_grad for n, w in policy.named_parameters() if n not in frozen)


@torch.no_grad()
def test_adapter_and_head_come_back_and_merging_changes_nothing(tmp_path):
    policy = lora_policy(tmp_path / "base")
    before = policy(input_ids=TOKENS)
    policy.save_pretrained(tmp_path / "adapter")
    files = {str(p.relative_to(tmp_path / "adapter")) for p in (tmp_path / "adapter").rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", VALUE_HEAD_FILE} <= files
    assert "model.safetensors" not in files
    again = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(input_ids=TOKENS).logits, before.logits)
    assert torch.equal(again(input_ids=TOKENS).value, before.value)
    assert sum(weight.requires_grad for weight in again.parameters()) > 2
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(plain(input_ids=TOKENS).logits, before.logits)
    merged = policy.pretrained_model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, before.logits)


def test_an_adapter_that_is_not_to_be_trained_is_not(tmp_path):
    lora_policy(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    again = CausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=False)
    trained = [name for name, weight in again.named_parameters() if weight.requires_grad]
    assert trained == ["v_head.summary.weight", "v_head.summary.bias"]


def test_a_prompt_that_is_learned_is_refused_clearly():
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"virtual tokens.* LoRA"):
        CausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=config)


def test_a_second_adapter_is_refused(tmp_path):
    policy = lora_policy(tmp_path)
    with pytest.raises(ValueError, match=r"`peft_config` must be None .*merge"):
        CausalLMWithValueHead.from_pretrained(
            policy.pretrained_model, peft_config=LoraConfig(**LORA)
        )
    with pytest.raises(ValueError, match="`unfrozen_layers` must be None beside an adapter"):
        CausalLMWithValueHead(policy.pretrained_model, unfrozen_layers=1)


# -- reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_top_layers_and_what_is_above_move_and_the_reference_stays(family, precision):
    """As with `num_shared_layers` of older releases: a norm and a head that is not tied train."""
    plain = tiny_model(family)
    expected = ResponseModel(plain)(ragged_rollout()).logprobs.detach()
    policy = CausalLMWithValueHead(plain, unfrozen_layers=1)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trainer = PPOTrainer(
        policy, batch_size=3, minibatch_size=1, learning_rate=1e-3, precision=precision
    )
    rounding = 1e-5 if precision == "fp32" else 0.1
    of_reference = []
    for _ in range(3):
        stats = trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])
        of_reference.append(torch.from_numpy(stats["objective/ref_logprobs"]))
        torch.testing.assert_close(of_reference[-1], expected, rtol=rounding, atol=rounding)
    assert torch.equal(of_reference[1], of_reference[2])
    assert stats["objective/kl"] != 0
    moved = {n for n, w in policy.named_parameters() if not torch.equal(before[n], w)}
    assert moved == {n for n, w in policy.named_parameters() if w.requires_grad}
    above = {"gpt2": ("ln_f.",), "qwen3": ("norm.", "lm_head.")}[family]
    places = (".layers.1.", ".h.1.", "v_head.", *(f"model.{name}" for name in above))
    places = (*places, *(f"transformer.{name}" for name in above))
    assert all(any(place in name for place in places) for name in moved)
    assert all(any(name in weight for weight in moved) for name in above)
    assert len(moved) > 8


def test_a_shared_trunk_trains_like_a_copy_that_computes_everything():
    """The kept states change the speed, not the numbers."""
    results = []
    for kind in ("shared-trunk", "copy"):
        policy = CausalLMWithValueHead(tiny_model("llama"), unfrozen_layers=1)
        trainer = PPOTrainer(
            policy,
            kind,
            batch_size=3,
            minibatch_size=2,
            forward_batch_size=1,
            learning_rate=1e-3,
            precision="fp32",
        )
        if kind == "copy":
            trainer.updater.responder.trunk = None
        for _ in range(2):
            stats = trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])
        results.append((stats["objective/kl"], stats["ppo/loss/total"], stats["ppo/grad_norm"]))
    torch.testing.assert_close(*map(torch.tensor, results), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("llama", 0, "from 1 to 1 .* got 0"),
        ("llama", 2, "from 1 to 1 .* got 2"),
        ("llama", True, "from 1 to 1 .* got True"),
    ],
)
def test_a_wrong_number_of_layers_is_named(family, layers, message):
    with pytest.raises(ValueError, match=message):
        CausalLMWithValueHead(tiny_model(family), unfrozen_layers=layers)


def test_an_encoder_decoder_is_not_split():
    with pytest.raises(ValueError, match="must be None for .*: it is an encoder-decoder"):
        Seq2SeqLMWithValueHead(tiny_model("t5"), unfrozen_layers=1)


def test_without_a_reference_the_kl_is_not_measured():
    policy = CausalLMWithValueHead(tiny_model("llama"))
    with pytest.raises(ValueError, match="`init_kl_coef` must be 0 without a reference"):
        PPOTrainer(policy, "none")
    trainer = PPOTrainer(
        policy, "none", batch_size=3, minibatch_size=3, init_kl_coef=0.0, precision="fp32"
    )
    assert trainer.ref_model is None
    stats = trainer.step(ragged_rollout(), [1.0, -1.0, 0.0])
    assert stats["objective/kl"] != stats["objective/kl"]  # NaN
    assert stats["ppo/mean_non_score_reward"] == 0
    assert stats["objective/kl_coef"] == 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapters-off", "must go with a policy that was loaded with peft_config"),
        ("shared-trunk", "must go with a policy that was loaded with unfrozen_layers"),
        ("adapter-off", "Did you mean `adapters-off`"),
    ],
)
def test_a_reference_that_does_not_fit_is_named(kind, message):
    with pytest.raises(ValueError, match=message):
        PPOTrainer(CausalLMWithValueHead(tiny_model("llama")), kind)
