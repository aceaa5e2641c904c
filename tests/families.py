"""Tiny random models of many families, to try what the library promises for all of them."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 61

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": 2}

CAUSAL: dict[str, dict] = {
    "gpt2": {"n_inner": 64},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gpt_neox": {},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8, "head_dim": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": _GROUPED,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False},
    "gptj": {"rotary_dim": 4, "n_inner": 64},
    "cohere": _GROUPED | {"logit_scale": 0.25},
    "granite": _GROUPED | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "stablelm": _GROUPED,
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "qwen2_moe": _GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
}
"""By `model_type`, what its configuration needs besides the common shape."""

SEQ2SEQ: dict[str, dict] = {
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 2,
        "initializer_factor": 1.0,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "init_std": 0.2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 64,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 2,
        "initializer_factor": 1.0,
    },
    "t5gemma": {"decoder_start_token_id": 2},  # the token of padding, as in the published ones
}

_T5GEMMA = _SHAPE | _GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of the family with two layers of width 32."""
    if family == "t5gemma":
        config = AutoConfig.for_model(family, encoder=dict(_T5GEMMA), decoder=dict(_T5GEMMA))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, _SHAPE[name])
        config.decoder_start_token_id = SEQ2SEQ[family]["decoder_start_token_id"]
        return config
    if family in SEQ2SEQ:
        common = {key: _SHAPE[key] for key in _SHAPE if key.endswith("_id") or key == "vocab_size"}
        positions = {"max_position_embeddings": 64} if family == "bart" else {}
        return AutoConfig.for_model(family, **common | positions | SEQ2SEQ[family])
    return AutoConfig.for_model(family, **_SHAPE | CAUSAL[family])


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of the family with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    return auto.from_config(tiny_config(family)).eval()
