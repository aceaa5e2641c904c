"""Another family: a tiny Llama made from a config, or any causal model by name.

    python examples/llama.py
    python examples/llama.py --model Qwen/Qwen3-0.6B-Base

The reward is the share of the letter "e" in a response: something that any model can learn, even
one with random weights, which is what the tiny Llama has. Its tokenizer is the starter model's.
"""

import argparse

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import trl
from trl import starter


def letter_e(responses):
    """Share of the letter in what the policy wrote."""
    return [response.count("e") / max(1, len(response)) for response in responses]


def tiny_llama(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub name; without it, the tiny Llama")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model or starter.LANGUAGE_MODEL)
    model, history = trl.train(
        model=options.model or tiny_llama(len(tokenizer)),
        tokenizer=tokenizer,
        prompts=starter.prompts("train"),
        reward=letter_e,
        steps=options.steps,
        max_new_tokens=12,
        batch_size=64,
        ref_model="none",  # random weights are nothing to stay close to
        on_step=lambda step, row: print(f"step {step}: {row['reward/mean']:.1%} of it is e"),
    )

    first, last = history[0]["reward/mean"], history[-1]["reward/mean"]
    print(f"{type(model.language_model).__name__}: {first:.1%} at first, {last:.1%} at the end")
    assert last > first + 0.01, (first, last)


if __name__ == "__main__":
    main()
