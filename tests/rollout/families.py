"""A tiny random model of each family that the sampler supports, and a value head around any."""

from types import SimpleNamespace

import torch
import transformers
from torch import nn

VOCAB = 60
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 6}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}

# Windows of 4 to 6 tokens: shorter than query and response.
FAMILIES = {
    "gpt2": ("GPT2", SIZES),
    "gpt_neo": (
        "GPTNeo",
        SIZES
        | {"num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 6}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3Text",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("Phi", LLAMA),
    "opt": (
        "OPT",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "bloom": ("Bloom", SIZES | {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", SIZES),
    "falcon_alibi": ("Falcon", SIZES | {"alibi": True}),
    "mamba": ("Mamba", SIZES | {"state_size": 4, "time_step_rank": 4}),
    "mixtral": ("Mixtral", LLAMA | MOE),
    "t5": (
        "T5",
        SIZES
        | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "bart": (
        "Bart",
        SIZES
        | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}
        | {"forced_eos_token_id": None},
    ),
}
SEQ2SEQ = ("t5", "bart")
# Standard deviations of the weights for which tokens are neither equally likely nor certain.
SCALES = {"t5": 1.0, "gemma2": 0.15, "gemma3": 0.14, "bloom": 0.2}


class WithValue(nn.Module):
    """A wrapper as the library's own: plain arguments in, the plain output and `.value` out."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model
        self.head = nn.Linear(VOCAB, 1)

    def forward(self, **inputs):
        output = self.language_model(**inputs)
        # Of the logits, which are there for every family; a real one reads the hidden states.
        value = self.head(output.logits.float())[..., 0]
        return SimpleNamespace(**output, value=value)


def make(family, seed=0):
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings)
    auto = "AutoModelForSeq2SeqLM" if family in SEQ2SEQ else "AutoModelForCausalLM"
    model = WithValue(getattr(transformers, auto).from_config(config))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=SCALES.get(family, 0.3))
    return model.eval()
