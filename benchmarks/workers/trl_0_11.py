"""The side of `trl==0.11.4`, the last release of Hugging Face TRL whose trainer had `step()`.

As shipped: mixed precision through accelerate, its own Adam. With `--tuned` it also gets what a
user could add from outside: a fused Adam, and generation under autocast. It has no lengths for
single rows: without an EOS, all are sampled to the length of the longest.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from typing import Any

import torch
from side import Batch, Side, argument_parser, build_language_model, serve
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from workloads import Workload

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.simplefilter("ignore")


class PeerSide(Side):
    """`PPOTrainer.generate` and `PPOTrainer.step` of trl 0.11.4."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        workload = arguments.workload
        model, reference = (build_model(workload) for _ in range(2))
        settings = PPOConfig(
            batch_size=workload.batch_size,
            mini_batch_size=workload.minibatch_size,
            ppo_epochs=workload.ppo_epochs,
            accelerator_kwargs={
                "cpu": arguments.device == "cpu",
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
        self.device = arguments.device
        self.longest = workload.response_length[1]

    def generate(self, batch: Batch) -> list[Tensor]:
        """Sample all rows in one batch (by default it takes four at a time)."""
        context = (
            torch.autocast(self.device, torch.bfloat16)
            if self.autocast
            else contextlib.nullcontext()
        )
        with context:
            return self.trainer.generate(
                batch.queries,
                batch_size=len(batch.queries),
                return_prompt=False,
                remove_padding=False,
                max_new_tokens=self.longest,
                min_length=-1,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )

    def step(self, batch: Batch) -> dict[str, Any]:
        """Make one PPO step."""
        return self.trainer.step(batch.queries, batch.responses, list(batch.scores))


def build_model(workload: Workload) -> AutoModelForCausalLMWithValueHead:
    """Return the common language model with a value head that starts at zero."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        build_language_model(workload), summary_dropout_prob=0.0
    )
    torch.nn.init.zeros_(model.v_head.summary.weight)
    torch.nn.init.zeros_(model.v_head.summary.bias)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer that the trainer insists on; only its padding token is used."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser()
    parser.add_argument("--tuned", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    serve(PeerSide, parse_arguments(), ["trl", "transformers", "accelerate", "torch"])
