"""Frozen lower layers: what may be frozen, and what must stay so."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import VOCABULARY, tiny_model
from tests.models.policies import trainer_of
from trl.models.with_value_head import CausalLMWithValueHead


@pytest.mark.parametrize("layers", [1.0, "1", -1])
def test_the_number_of_layers_is_a_whole_number(layers):
    with pytest.raises(ValueError, match=rf"a whole number from 1 to 1 .* got {layers!r}"):
        CausalLMWithValueHead(tiny_model("llama"), unfrozen_layers=layers)


def test_layers_that_share_weights_with_lower_ones_are_refused():
    model = tiny_model("llama")
    low, top = model.model.layers
    top.mlp = low.mlp  # as in Zamba
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.gate_proj.weight`.* theirs too"):
        CausalLMWithValueHead(model, unfrozen_layers=1)
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    with pytest.raises(ValueError, match=r"`model.norm.weight`.* theirs too"):
        CausalLMWithValueHead(model, unfrozen_layers=1)


def test_zamba_is_refused():
    config = AutoConfig.for_model(
        "zamba",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        layers_block_type=["mamba", "hybrid"] * 3,
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_dt_rank=4,
        n_mamba_heads=2,
        pad_token_id=2,
    )
    with pytest.raises(ValueError, match="`unfrozen_layers` must be None for ZambaForCausalLM"):
        CausalLMWithValueHead(AutoModelForCausalLM.from_config(config), unfrozen_layers=1)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("kind", [None, "copy"])
def test_nothing_below_may_be_trained(name, kind):
    policy = CausalLMWithValueHead(tiny_model("llama"), unfrozen_layers=1)
    policy.language_model.get_submodule(name).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"`{name}.weight` has requires_grad=True"):
        trainer_of(policy, kind)


def test_a_family_that_breaks_when_split_is_named():
    config = AutoConfig.for_model("openai-gpt", vocab_size=VOCABULARY, n_embd=32, n_layer=2)
    config.n_head, config.n_positions = 4, 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    policy = CausalLMWithValueHead(model, unfrozen_layers=1)
    with pytest.raises(ValueError, match="must be None for OpenAIGPTLMHeadModel: its layers hand"):
        trainer_of(policy)
