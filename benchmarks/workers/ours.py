"""The side of this project: a sampler and a trainer around a transformers model with a value head.

By default the step gets the prepared tokens, as everyone's does, and computes their log-probs and
values under the policy first. With `--recorded` it gets the rollout that was really sampled, with
the log-probs and values that the sampler wrote down on the way, which is how the library is used:
the rows, their lengths and the updates are the same, the tokens are other random ones, and one
no-grad pass over the batch is saved. Its stats can then not be equal to the others'; they must be
finite.

With `--unshared` a query that has several responses stands before each of them, in sampling and in
training, as if they had nothing in common.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from typing import Any

import torch
from side import Batch, Side, argument_parser, build_language_model, serve
from torch import Tensor

from trl import CausalLMWithValueHead, PPOTrainer, Rollout, Sampler


class OurSide(Side):
    """`Sampler` and `PPOTrainer.step`, in passes of as many rows as the token budget allows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        workload = arguments.workload
        lora = lora_config(workload.family) if arguments.lora else None
        plain = build_language_model(workload)
        self.policy = CausalLMWithValueHead.from_pretrained(
            plain.to(torch.bfloat16) if arguments.low_base else plain,
            peft_config=lora,
            unfrozen_layers=arguments.unfrozen_layers,
        )
        self.trainer = PPOTrainer(
            self.policy,
            None,
            batch_size=workload.batch_size,
            minibatch_size=workload.minibatch_size,
            forward_batch_size=None,
            ppo_epochs=workload.ppo_epochs,
            precision=arguments.precision,
            max_grad_norm=None,  # as trl 0.11.4 by default
            algorithm=arguments.algorithm,
        )
        self.group_size = 1 if arguments.unshared else workload.group_size
        shortest, longest = workload.response_length
        self.sampler = Sampler(
            None,
            max_new_tokens=(
                longest
                if shortest == longest
                else itertools.cycle(workload.response_lengths).__next__
            ),
            eos_token_id=None,
            group_size=self.group_size,
        )
        self.optimizer = self.trainer.optimizer
        self.recorded = arguments.recorded
        self.same_tokens = not arguments.recorded
        self.trains_all = lora is None and arguments.unfrozen_layers is None

    def generate(self, batch: Batch) -> list[Tensor]:
        """Sample all rows in one batch, each to its own length."""
        with self.trainer.sampling():
            self.sampled = self.sampler(self.policy, batch.queries[:: self.group_size])
        masked = zip(self.sampled.responses, self.sampled.response_mask, strict=True)
        return [row[mask] for row, mask in masked]

    def step(self, batch: Batch) -> dict[str, Any]:
        """Make one PPO step."""
        rollout = self.sampled if self.recorded else self.prepared(batch)
        return self.trainer.step(rollout, batch.scores)

    def prepared(self, batch: Batch) -> Rollout:
        """Return the rollout of the prepared responses."""
        rollout = Rollout.from_lists(batch.queries, batch.responses)
        if self.group_size == 1:
            return rollout
        return replace(rollout, group_ids=torch.arange(len(rollout)) // self.group_size)


def lora_config(family: str) -> Any:
    """Return LoRA of rank 16 on all matrices of the layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        target_modules="all-linear",
        fan_in_fan_out=family == "gpt2",  # its matrices are stored the other way round
        task_type="CAUSAL_LM",
    )


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser()
    parser.add_argument("--algorithm", default="ppo")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--unshared", action="store_true")
    parser.add_argument("--unfrozen-layers", type=int)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--low-base", action="store_true", help="the model under LoRA in bfloat16")
    return parser.parse_args(given)


if __name__ == "__main__":
    serve(OurSide, parse_arguments(), ["transformers", "torch"])
