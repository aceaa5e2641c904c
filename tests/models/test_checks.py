"""What is refused before anything is trained."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3Config

from tests.conftest import ragged
from tests.families import CAUSAL, SEQ2SEQ, VOCABULARY, tiny_config, tiny_model
from tests.models.policies import lora_config, ragged_rollout, step, trainer_of
from trl.anatomy import language_model
from trl.models.checks import check_fits, check_left_padding, check_one_pass
from trl.models.with_value_head import CausalLMWithValueHead, load_policy
from trl.rollout.sampler import Sampler

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "is_decoder": True,
}
# Positions that count columns, positions that begin at the padding's id + 1, recurrences that do
# not look at the mask, and a prompt that the model writes itself.
WITHOUT_LEFT_PADDING = {
    "bart": DECODER,
    "pegasus": DECODER,
    "trocr": DECODER,
    "roberta": SHAPE | {"is_decoder": True},
    "xlm-roberta": SHAPE | {"is_decoder": True},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "recurrent_gemma": SHAPE | {"lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "cpmant": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dim_head": 8,
        "dim_ff": 64,
    },
}


def model_of(family, settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


@pytest.mark.parametrize("family", list(CAUSAL))
def test_families_that_take_left_padding_pass_and_nothing_is_changed(family):
    model = tiny_model(family).train()
    state = torch.get_rng_state()
    check_left_padding(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", [name for name in CAUSAL if name != "mamba"])
def test_rounding_of_bf16_is_no_padding(family):
    check_left_padding(tiny_model(family).to(torch.bfloat16))


def test_an_encoder_decoder_has_no_left_padding():
    check_left_padding(tiny_model("bart"))


@pytest.mark.parametrize("family", WITHOUT_LEFT_PADDING)
def test_families_without_left_padding_are_named(family):
    model = model_of(family, WITHOUT_LEFT_PADDING[family])
    with pytest.raises(ValueError, match=f"`{type(model).__name__}` must take rows that are padd"):
        check_left_padding(model)


PROPHETNET = {
    "init_std": 0.2,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_that_read_token_by_token_as_at_once_pass(family, dtype):
    check_one_pass(tiny_model(family).to(dtype))


@pytest.mark.parametrize("family", ["bert", "prophetnet"])
def test_families_that_look_at_what_follows_are_named(family):
    if family == "bert":
        model = model_of(family, SHAPE)
    else:
        config = AutoConfig.for_model(family, **PROPHETNET)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match=f"`{type(model).__name__}` must predict .*change by what follows"
    ):
        trainer_of(load_policy(model))
    if family == "bert":
        with pytest.raises(
            ValueError, match="`BertLMHeadModel` must predict .*change by what follows"
        ):
            trainer_of(load_policy(tiny_model("gpt2")), model)


def test_a_cache_that_is_wrong_is_named(monkeypatch):
    """As that of MiniMax is, to whoever leaves the positions to it."""
    model = tiny_model("llama")
    attend = model.model.layers[1].self_attn.forward

    def forward(hidden_states, **kwargs):
        if hidden_states.shape[1] == 1:
            kwargs["past_key_values"] = None
            kwargs["attention_mask"] = None
        return attend(hidden_states, **kwargs)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", forward)
    with pytest.raises(ValueError, match="`LlamaForCausalLM` must predict .* change by its cache"):
        trainer_of(load_policy(model))


class Quantizer:
    """What transformers keeps beside a quantised model."""

    def __init__(self, is_trainable, is_qat_trainable=False):
        self.is_trainable, self.is_qat_trainable = is_trainable, is_qat_trainable


@pytest.mark.parametrize(
    ("quantized", "adapter", "quantizer", "message"),
    [
        (True, False, Quantizer(True), r"not be quantised .*bitsandbytes.*peft_config=LoraConfig"),
        (True, False, Quantizer(False), r"not be quantised .*peft_config=LoraConfig"),
        (True, False, None, r"not be quantised .*peft_config=LoraConfig"),
        (True, True, Quantizer(False), r"not be quantised .*nor an adapter"),
        (True, True, Quantizer(True), None),
        (True, False, Quantizer(False, True), None),
        (False, False, None, None),  # a GGUF file, whose numbers become float32
    ],
)
def test_a_quantised_model_is_trained_by_an_adapter(quantized, adapter, quantizer, message):
    plain = tiny_model("llama")
    plain.is_quantized, plain.quantization_method = quantized, "bitsandbytes"
    if quantizer is not None:
        plain.hf_quantizer = quantizer
    how = {"peft_config": lora_config()} if adapter else {}
    policy = load_policy(plain, **how)
    if message is None:
        trainer_of(policy)
        return
    with pytest.raises(ValueError, match=f"`model` must {message}"):
        trainer_of(policy)
    trainer_of(load_policy(tiny_model("llama")), plain)  # as the reference it may be
    plain.requires_grad_(False)
    if not adapter:  # the value head alone
        trainer_of(policy)


def test_the_trainer_refuses_them_as_policy_and_as_reference():
    roberta = model_of("roberta", WITHOUT_LEFT_PADDING["roberta"])
    with pytest.raises(ValueError, match="`RobertaForCausalLM` must take rows that are padded"):
        trainer_of(CausalLMWithValueHead(roberta))
    with pytest.raises(ValueError, match="`RobertaForCausalLM` must take rows that are padded"):
        trainer_of(CausalLMWithValueHead(tiny_model("llama")), roberta)


def test_a_reference_that_is_trained_too_is_refused():
    plain = tiny_model("llama")
    with pytest.raises(ValueError, match=r"`ref_model` must have weights of its own.* always be 0"):
        trainer_of(CausalLMWithValueHead(plain), plain)
    base = tiny_model("llama")
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=lora_config())
    with pytest.raises(ValueError, match=r"`ref_model` must have weights of its own.*lora_"):
        trainer_of(policy, base)


def test_a_reference_may_share_what_is_frozen():
    policy = CausalLMWithValueHead(tiny_model("llama"), unfrozen_layers=1)
    reference = tiny_model("llama", seed=1)
    reference.model.embed_tokens = policy.language_model.model.embed_tokens
    assert step(trainer_of(policy, reference))["objective/kl"] != 0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_on_the_embedding_trains(changes):
    base = tiny_model("llama")
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(**changes))
    trainer = trainer_of(policy, tiny_model("llama"))
    assert step(trainer)["objective/kl"] != 0
    rollout = ragged_rollout()
    rollout.responses[0, 0] = VOCABULARY
    with pytest.raises(ValueError, match=r"`response\[0\]` must hold token ids from 0 to 60"):
        check_fits(policy, rollout)


def gemma3():
    """A model for text and images: sizes of the text part stand in a configuration of its own."""
    config = Gemma3Config(
        text_config=SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=60,
        boi_token_index=59,
        eoi_token_index=58,
        mm_tokens_per_image=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_text_part_of_a_composite_model_is_looked_at():
    policy = CausalLMWithValueHead(gemma3(), unfrozen_layers=1)
    trainer = trainer_of(policy)
    assert trainer.reference.kind == "shared-trunk"
    assert abs(step(trainer)["objective/kl"]) < 1e-5
    language_model(policy).config.text_config.max_position_embeddings = 7
    with pytest.raises(ValueError, match="must fit the model's 7 positions, got 7 . 1 tokens"):
        check_fits(policy, ragged_rollout())


def with_rotary(family, scaling, **sizes):
    config = tiny_config(family)
    for name, value in sizes.items():
        setattr(config, name, value)
    config.rope_parameters = {"rope_theta": 10000.0} | scaling
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "default"}, 10),
        (DYNAMIC, 10),  # beyond, every token changes what was recorded of those before
        (LINEAR, 20),
        (YARN, 24),
        (LLAMA3, 24),
    ],
)
def test_scaled_positions_are_trained_as_far_as_they_reach(scaling, limit):
    policy = CausalLMWithValueHead(with_rotary("llama", scaling, max_position_embeddings=10))
    queries, responses = ragged([limit - 6, 2], 0, VOCABULARY), ragged([6, 3], 1, VOCABULARY)
    rollout = Sampler(None, max_new_tokens=6, eos_token_id=None)(policy, queries)
    trainer = trainer_of(policy, batch_size=2, minibatch_size=2)
    assert trainer.step(rollout, [1.0, -1.0])["ppo/first_log_ratio"] < 1e-5
    too_long = [torch.cat((queries[0], queries[0][:1])), queries[1]]
    with pytest.raises(ValueError, match=f"must fit the model's {limit} positions, got"):
        trainer.step(too_long, responses, [1.0, -1.0])


@pytest.mark.parametrize(
    ("queries", "fits"),
    [([10, 2], True), ([11, 2], False), ([20, 16], False), ([20, 17], True), ([17, 20], True)],
)
def test_rows_on_both_sides_of_the_border_of_longrope_are_refused(queries, fits):
    """What is recorded of the shorter ones would depend on what is beside them."""
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    plain = with_rotary("phi3", scaling, original_max_position_embeddings=16)
    policy = CausalLMWithValueHead(plain)
    queries, responses = ragged(queries, 0, VOCABULARY), ragged([6, 6], 1, VOCABULARY)
    sampler = Sampler(None, max_new_tokens=6, eos_token_id=None)
    trainer = trainer_of(policy, batch_size=2, minibatch_size=2)
    if fits:
        rollout = sampler(policy, queries)
        assert trainer.step(rollout, [1.0, -1.0])["ppo/first_log_ratio"] < 1e-5
        return
    rule = "must all be longer than 16 tokens, or fit into as many with their responses, got a que"
    with pytest.raises(ValueError, match=rule):
        sampler(policy, queries)
    with pytest.raises(ValueError, match=rule):
        trainer.step(queries, responses, [1.0, -1.0])
