"""A Llama of two layers with a vocabulary of some words, which the examples here learn with.

It has random weights and knows nothing, and the games are as small. Name a chat model in its place,
such as "HuggingFaceTB/SmolLM2-135M-Instruct", and leave out `call_format`: prompts are then sent as
messages, and how tools are shown and called is for its chat template to say.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny(words):
    """Return a model and its tokenizer; each word is a token, all others are "?"."""
    vocabulary = {word: number for number, word in enumerate(["<end>", "?", *words.split()])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", unk_token="?")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer
