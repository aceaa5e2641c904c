import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import CAUSAL, SEQ2SEQ, VOCABULARY, tiny_model
from tests.models.policies import lora_config
from trl.anatomy import decoder, try_out, vocabulary_size
from trl.models.with_value_head import CausalLMWithValueHead

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_the_decoder_is_the_one_that_transformers_names(family):
    model = tiny_model(family)
    assert decoder(model) is model.get_decoder()
    assert vocabulary_size(model) == VOCABULARY


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        (
            "llama4_text",
            {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2},
            "Llama4TextModel",
        ),
        ("modernbert-decoder", {}, "ModernBertDecoderModel"),
    ],
)
def test_a_family_whose_get_decoder_is_wrong_has_one_all_the_same(family, settings, expected):
    config = AutoConfig.for_model(family, **SHAPE | settings)
    model = AutoModelForCausalLM.from_config(config)
    assert type(decoder(model)).__name__ == expected
    assert try_out(model)[1].shape == (2, 4, 32)


def test_a_model_without_a_decoder_is_named(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    monkeypatch.setattr(type(model), "base_model_prefix", "lm_head")
    model.model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="apart from its language head, got LlamaForCausalLM"):
        decoder(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_the_vocabulary_is_that_of_the_embedding_inside_an_adapter(changes):
    base = tiny_model("llama")
    policy = CausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(**changes))
    assert vocabulary_size(policy) == vocabulary_size(policy.pretrained_model) == VOCABULARY
