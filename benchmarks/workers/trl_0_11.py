"""The side of `trl==0.11.4`, the last release of Hugging Face TRL whose trainer had `step()`.

As shipped: mixed precision through accelerate, its own Adam. With `--tuned` it also gets what a
user could add from outside: a fused Adam, and generation under autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from workload import Side, fill_weights, serve

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.simplefilter("ignore")


class PeerSide(Side):
    """`PPOTrainer.generate` and `PPOTrainer.step` of trl 0.11.4."""

    def __init__(self, arguments: argparse.Namespace, config: GPT2Config) -> None:
        model, reference = (build_model(config) for _ in range(2))
        settings = PPOConfig(
            batch_size=arguments.batch_size,
            mini_batch_size=arguments.minibatch_size,
            ppo_epochs=arguments.ppo_epochs,
            accelerator_kwargs={
                "cpu": True,
                "mixed_precision": "bf16" if arguments.precision == "bf16" else "no",
            },
        )
        optimizer = None
        if arguments.tuned:
            optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
        self.trainer = PPOTrainer(
            settings, model, reference, tokenizer=build_tokenizer(), optimizer=optimizer
        )
        self.optimizer = self.trainer.optimizer
        self.autocast = arguments.tuned and arguments.precision == "bf16"

    def generate(self, queries: Tensor, length: int) -> Tensor:
        """Sample all rows in one batch (by default it takes four at a time)."""
        context = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        )
        with context:
            responses = self.trainer.generate(
                list(queries),
                batch_size=len(queries),
                return_prompt=False,
                remove_padding=False,
                max_new_tokens=length,
                min_length=-1,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        return torch.stack(responses)

    def step(self, queries: Tensor, responses: Tensor, scores: Tensor) -> dict[str, Any]:
        """Make one PPO step."""
        return self.trainer.step(list(queries), list(responses), list(scores))


def build_model(config: GPT2Config) -> AutoModelForCausalLMWithValueHead:
    """GPT-2 with a value head, with the weights that every side gets."""
    language_model = GPT2LMHeadModel(config)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        language_model, summary_dropout_prob=0.0
    )
    fill_weights(model.pretrained_model)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    torch.nn.init.zeros_(model.v_head.summary.bias)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer that the trainer insists on; only its padding token is used."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


if __name__ == "__main__":
    serve(PeerSide, ["trl", "transformers", "accelerate", "torch"])
