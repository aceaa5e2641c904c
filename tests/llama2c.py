"""A model in the format of llama2.c as a Llama of transformers, with its tokenizer.

The format: seven int32 (dim, hidden, layers, heads, KV heads, vocabulary, positions), then the
weights in float32, kind by kind for all layers. Rotary pairs are neighbours there, and halves
apart in transformers, so the rows of the query and key projections change places.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 1, 2


def load_model(path: Path) -> LlamaForCausalLM:
    """Read the weights."""
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = np.fromfile(path, "<i4", 7)
    numbers = torch.from_numpy(np.fromfile(path, "<f4", offset=28))
    taken = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal taken
        size = int(np.prod(shape))
        taken += size
        return numbers[taken - size : taken].view(*map(int, shape))

    def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, columns = weight.shape
        pairs = weight.view(int(heads), int(rows) // int(heads) // 2, 2, columns)
        return pairs.transpose(1, 2).reshape(rows, columns)

    kv = dim // heads * kv_heads
    weights = {"model.embed_tokens.weight": take(vocabulary, dim)}
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        for layer in range(layers):
            weight = take(*shape)
            if name == "self_attn.q_proj":
                weight = halves_apart(weight, heads)
            elif name == "self_attn.k_proj":
                weight = halves_apart(weight, kv_heads)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    weights["model.norm.weight"] = take(dim)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=int(vocabulary),
        hidden_size=int(dim),
        intermediate_size=int(hidden),
        num_hidden_layers=int(layers),
        num_attention_heads=int(heads),
        num_key_value_heads=int(kv_heads),
        max_position_embeddings=int(positions),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def load_tokenizer(path: Path, size: int) -> PreTrainedTokenizerFast:
    """Read the tokens and their scores; a merge of two tokens is as early as its score is high."""
    data = path.read_bytes()
    place, tokens, scores = 4, [], []
    for _ in range(size):
        score, length = struct.unpack_from("<fi", data, place)
        place += 8 + length
        tokens.append(data[place - length : place].decode().replace(" ", "▁"))
        scores.append(score)
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token in sorted(tokens[259:], key=lambda token: vocabulary[token]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += [(-scores[vocabulary[token]], pair) for pair in known]
    merges = [pair for _, pair in sorted(merges, key=lambda entry: entry[0])]
    bpe = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
