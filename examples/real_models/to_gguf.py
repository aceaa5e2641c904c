"""Write a model of the Llama family as one GGUF file, for llama.cpp and what is built on it.

    pip install gguf
    python examples/real_models/to_gguf.py runs/chat-reward/policy tuned.gguf

Takes the folder of a tuned policy (or of any LlamaForCausalLM with a byte-level BPE tokenizer, as
SmolLM2 has). Matrices are written as float16, norms as float32. llama.cpp rotates neighbouring
pairs of q and k where transformers rotates halves: the rows of these two are put in its order.
transformers reads the file again with `from_pretrained(folder, gguf_file="tuned.gguf")`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PLACES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCKS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names in transformers and in GGUF."""


def to_gguf(folder: Path, file: Path) -> None:
    """Write the model of a folder as a GGUF file.

    Raises:
        ValueError: if it is not of the Llama family, or its tokenizer is not a byte-level BPE.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check(model, tokenizer)
    writer = gguf.GGUFWriter(file, "llama")
    add_settings(writer, model)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            writer.add_tensor(place_of(name), stored(name, weight, model.config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise a ValueError for what this exporter does not know."""
    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"`folder` must hold a Llama model without biases, got {config.model_type}: "
            "llama.cpp's own converter knows others."
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"`folder` must hold a model without RoPE scaling, got {rope}.")
    kind = json.loads(tokenizer.backend_tokenizer.to_str())
    if kind["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(kind["decoder"]):
        raise ValueError(
            f"`folder` must hold a byte-level BPE tokenizer, got {kind['model']['type']}."
        )


def add_settings(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """Write what the shape of the model is."""
    config = model.config
    writer.add_name(Path(config.name_or_path).name or "model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write vocabulary, merges, special tokens and the chat template; unused ids get a name."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    special |= {entry["id"] for entry in described["added_tokens"] if entry["special"]}
    added = {entry["id"] for entry in described["added_tokens"]}
    types = gguf.TokenType

    def kind(index: int) -> gguf.TokenType:
        if index not in by_id:
            return types.UNUSED
        if index in special:
            return types.CONTROL
        return types.USER_DEFINED if index in added else types.NORMAL

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if "Digits" in json.dumps(described) else "gpt-2")
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kind(index) for index in range(size)])
    merges = described["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)  # the chat template begins texts as they are to begin
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def place_of(name: str) -> str:
    """Return the name that GGUF has for a weight."""
    if name in PLACES:
        return PLACES[name]
    _, _, block, rest = name.split(".", 3)  # model.layers.7.mlp.up_proj.weight
    module, _, kind = rest.rpartition(".")
    return f"blk.{block}.{IN_BLOCKS[module]}.{kind}"


def stored(name: str, weight: Tensor, config: Any) -> Tensor:
    """Return a weight as the file holds it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, count in heads.items():
        if f".{module}." in name:
            weight = interleaved(weight, count)
    return weight.contiguous() if weight.dim() == 1 else weight.half().contiguous()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows [heads·d, ·] of each head: i and i + d/2, which rotate together, meet."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama model as a GGUF file.")
    parser.add_argument("folder", type=Path, help="of the model and its tokenizer")
    parser.add_argument("file", type=Path, help="to write")
    chosen = parser.parse_args()
    to_gguf(chosen.folder, chosen.file)
    print(f"{chosen.file}: {chosen.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
