"""What must hold for every family of language models."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from tests.conftest import ragged
from tests.families import CAUSAL, SEQ2SEQ, VOCABULARY, tiny_config, tiny_model
from tests.models.policies import lora_config
from tests.rows import quick
from trl.anatomy import response_start
from trl.batch import Rollout
from trl.compute.passes import with_trunk_states
from trl.models.response import ResponseModel
from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead
from trl.ppo import PPOTrainer

FAMILIES = [*CAUSAL, *SEQ2SEQ]
OFTEN = ("gpt2", "llama", "mixtral", "mamba", "t5")

# Log-probs of padded and single rows agree to rounding; a state-space model scans in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

OWN_LOGITS = ("switch_transformers", "t5gemma")
"""Families whose language head does more than multiply: the model makes the logits itself."""


def policy_of(family):
    """A policy whose value head is not zero."""
    kind = Seq2SeqLMWithValueHead if family in SEQ2SEQ else CausalLMWithValueHead
    model = kind(tiny_model(family))
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
    return model


def rows(lengths, seed=0):
    return ragged(lengths, seed, VOCABULARY)


def ragged_rollout(holes=False):
    masks = None
    if holes:
        masks = [torch.tensor(m) for m in ([1, 0, 0, 1, 1], [1], [0, 1, 1])]
    return Rollout.from_lists(rows([2, 7, 4]), rows([5, 1, 3], seed=1), response_masks=masks)


def naive(policy, query, response):
    """Log-probs and values of one response, by the model's own forward pass, without padding."""
    if policy.config.is_encoder_decoder:
        start = torch.tensor([policy.config.decoder_start_token_id])
        output = policy(
            input_ids=query[None], decoder_input_ids=torch.cat((start, response[:-1]))[None]
        )
        logits, values = output.logits[0], output.value[0]
    else:
        output = policy(input_ids=torch.cat((query, response))[None])
        first, last = len(query) - 1, len(query) + len(response) - 1
        logits, values = output.logits[0, first:last], output.value[0, first:last]
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0], values


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ragged_rows_equal_the_models_own_forward_pass_row_by_row(family):
    policy = policy_of(family)
    rollout = ragged_rollout(holes=True)
    responder = ResponseModel(policy)
    assert responder.head.complete == (family not in OWN_LOGITS)
    output = responder(rollout)
    for row, (query, response) in enumerate(zip(rows([2, 7, 4]), rows([5, 1, 3], 1), strict=True)):
        logprobs, values = naive(policy, query, response)
        mask = rollout.response_mask[row, : len(response)]
        torch.testing.assert_close(
            output.logprobs[row, : len(response)], logprobs * mask, **TOLERANCE
        )
        torch.testing.assert_close(output.values[row, : len(response)], values * mask, **TOLERANCE)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "t5", "bart", "llama", "mamba"])
@torch.no_grad()
def test_a_model_with_an_unknown_last_step_makes_its_logits_itself(family, monkeypatch):
    policy = policy_of(family)
    expected = ResponseModel(policy)(ragged_rollout())
    plain = policy.language_model
    own = plain.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    forward.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(plain, "forward", forward)
    responder = ResponseModel(policy, temperature=1.5)
    assert not responder.head.complete
    output = responder(ragged_rollout())
    torch.testing.assert_close(output.logprobs, expected.logprobs, **TOLERANCE)
    torch.testing.assert_close(output.values, expected.values, **TOLERANCE)


@pytest.mark.parametrize("family", quick(FAMILIES, *OFTEN))
def test_a_step_trains_and_does_not_depend_on_the_micro_batch(family):
    weights = []
    for forward_batch_size in (None, 1):
        policy = policy_of(family)
        before = {name: weight.clone() for name, weight in policy.named_parameters()}
        trainer = PPOTrainer(
            policy,
            batch_size=3,
            minibatch_size=3,
            ppo_epochs=2,
            forward_batch_size=forward_batch_size,
            learning_rate=1e-3,
            precision="fp32",
        )
        stats = trainer.step(ragged_rollout(), [1.0, -1.0, 0.5])
        assert abs(stats["objective/kl"]) < 1e-5
        assert stats["ppo/first_log_ratio"] < 1e-4
        assert stats["ppo/updates"] == 2
        moved = [not torch.equal(before[n], w) for n, w in policy.named_parameters()]
        assert sum(moved) > 0.8 * len(moved)
        after = ResponseModel(policy)(ragged_rollout())
        weights.append(after.logprobs.detach())
    # Not the weights themselves: Adam's first steps turn a gradient of rounding error into ±lr.
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_save_and_load_are_bit_exact_and_plain_transformers_loads_silently(
    family, tmp_path, caplog
):
    policy = policy_of(family)
    policy.save_pretrained(tmp_path)
    again = type(policy).from_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    caplog.clear()
    plain, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    tokens = torch.arange(12).view(2, 6) % VOCABULARY
    inputs = {"input_ids": tokens}
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = tokens
    first, second, third = policy(**inputs), again(**inputs), plain.eval()(**inputs)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.logits, third.logits)


@pytest.mark.parametrize("family", list(CAUSAL))
@torch.no_grad()
def test_frozen_layers_are_shared_and_passes_start_above_them(family):
    kind = CausalLMWithValueHead
    whole, split = (kind(tiny_model(family), unfrozen_layers=k) for k in (None, 1))
    whole.v_head.summary.weight.data.fill_(0.1)
    split.v_head.summary.weight.data.fill_(0.1)
    trainer = PPOTrainer(split, batch_size=3, minibatch_size=3, precision="fp32")
    rollout = with_trunk_states(trainer.updater, ragged_rollout(), trainer.config)
    assert trainer.reference.kind == "shared-trunk"
    assert rollout.trunk_states.shape == (3, 11, 32)  # the last token predicts nothing
    expected = ResponseModel(whole)(ragged_rollout())
    output = trainer.forward_pass(trainer.policy, rollout)
    torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forced", [None, 7])
def test_what_generate_returns_is_trained_without_what_the_decoder_began_with(forced):
    """Trained as an action, it would put all the rest one place late."""
    policies = [policy_of("bart") for _ in range(2)]
    plain = policies[0].language_model
    plain.generation_config.forced_bos_token_id = forced
    policies[1].language_model.generation_config.forced_bos_token_id = forced
    queries, responses = rows([3, 5]), rows([4, 4], seed=1)
    start = response_start(plain)
    assert len(start) == (1 if forced is None else 2)
    generated = [torch.cat((torch.tensor(start), response)) for response in responses]
    stats = [
        PPOTrainer(policy, batch_size=2, minibatch_size=2, precision="fp32").step(
            queries, given, torch.tensor([1.0, -1.0])
        )
        for policy, given in zip(policies, (responses, generated), strict=True)
    ]
    assert stats[0]["objective/logprobs"].shape == stats[1]["objective/logprobs"].shape == (2, 4)
    assert (stats[0]["objective/logprobs"] == stats[1]["objective/logprobs"]).all()
    for one, other in zip(*(policy.parameters() for policy in policies), strict=True):
        assert torch.equal(one, other)


def test_a_model_whose_decoder_makes_the_logits_is_refused_when_it_is_wrapped():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    vocabularies = {"src_vocab_size": 61, "tgt_vocab_size": 61, "langs": ["en", "de"]}
    config = AutoConfig.for_model("fsmt", **sizes, **heads, **widths, **vocabularies)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(TypeError, match="decoder apart from its language head, got FSMT"):
        Seq2SeqLMWithValueHead(model)


def of_text_and_images(family):
    """A model that transformers counts among those that read images, and not the causal ones."""
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    text = tiny_config("qwen2" if family == "qwen2_5_vl" else "llama").to_dict()
    if family == "qwen2_5_vl":
        text["rope_parameters"] |= {"rope_type": "default", "mrope_section": [1, 1, 2]}
        text["model_type"] = "qwen2_5_vl_text"
        eyes = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
        tokens = {"image_token_id": 60, "video_token_id": 59}
        tokens |= {"vision_start_token_id": 58, "vision_end_token_id": 57}
    else:
        eyes = sizes | {"model_type": "clip_vision_model", "num_hidden_layers": 1}
        eyes |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        tokens = {"image_token_index": 60}
    config = AutoConfig.for_model(family, text_config=text, vision_config=eyes, **tokens)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("how", ["all", "the top", "LoRA"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_the_text_of_a_model_that_reads_images_trains_saves_and_loads(family, how, tmp_path):
    of_text_and_images(family).save_pretrained(tmp_path / "base")
    changes = {"all": {}, "the top": {"unfrozen_layers": 1}}
    changes |= {"LoRA": {"peft_config": lora_config(target_modules=["q_proj", "v_proj"])}}
    policy = CausalLMWithValueHead.from_pretrained(tmp_path / "base", **changes[how])
    before = [weight.clone() for weight in policy.parameters()]
    trainer = PPOTrainer(policy, batch_size=3, minibatch_size=3, precision="fp32")
    trainer.step(ragged_rollout(), [1.0, -1.0, 0.5])
    assert any(not torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))
    policy.save_pretrained(tmp_path / "policy")
    again = CausalLMWithValueHead.from_pretrained(tmp_path / "policy")
    assert type(again.language_model) is type(policy.language_model)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(policy(tokens).logits, again(tokens).logits)
    assert torch.equal(policy(tokens).value, again(tokens).value)
