"""The side of this project: `respond_to_batch` and `PPOTrainer.step`.

With `--tuned` generation runs at the trainer's precision, as in `trl demo`; `respond_to_batch`
alone runs at that of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config
from workload import Side, fill_weights, serve

from trl.gpt2 import GPT2HeadWithValueModel, respond_to_batch
from trl.ppo import PPOTrainer


class OurSide(Side):
    """The two doors of the README."""

    def __init__(self, arguments: argparse.Namespace, config: GPT2Config) -> None:
        self.model, reference = (build_model(config) for _ in range(2))
        self.trainer = PPOTrainer(
            self.model,
            reference,
            batch_size=arguments.batch_size,
            forward_batch_size=arguments.batch_size,
            minibatch_size=arguments.minibatch_size,
            ppo_epochs=arguments.ppo_epochs,
            precision=arguments.precision,
            max_grad_norm=None,  # as trl 0.11.4 by default
        )
        self.optimizer = self.trainer.optimizer
        self.tuned = arguments.tuned

    def generate(self, queries: Tensor, length: int) -> Tensor:
        """Sample all rows in one batch."""
        with self.trainer.autocast() if self.tuned else contextlib.nullcontext():
            return respond_to_batch(self.model, queries, txt_len=length)

    def step(self, queries: Tensor, responses: Tensor, scores: Tensor) -> dict[str, Any]:
        """Make one PPO step."""
        return self.trainer.step(queries, responses, scores)


def build_model(config: GPT2Config) -> GPT2HeadWithValueModel:
    """GPT-2 with a value head, with the weights that every side gets."""
    model = GPT2HeadWithValueModel(config)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    fill_weights(model)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    return model


if __name__ == "__main__":
    serve(OurSide, ["transformers", "torch"])
