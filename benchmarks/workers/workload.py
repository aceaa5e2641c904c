"""What every side of the comparison is given, and how every side is timed.

Each worker builds a trainer around the model made here and then serves iterations, one for each
line on its standard input, with one line of JSON on its standard output for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config

GIB_PER_MAXRSS = 1 / 2**30 if sys.platform == "darwin" else 1 / 2**20
STATS_TO_COMPARE = (
    "objective/entropy",
    "objective/kl",
    "ppo/returns/mean",
    "ppo/loss/value",
    "ppo/policy/approxkl",
)
"""Numbers that both trainers define alike. The last two depend on how the minibatches were
shuffled, unless there is only one; the others must be equal in the first iteration."""


class Side(ABC):
    """One contender: a model, its frozen reference and a PPO trainer around them."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def generate(self, queries: Tensor, length: int) -> Tensor:
        """Sample exactly `length` tokens after each of the queries [B, Q]; returns [B, R]."""

    @abstractmethod
    def step(self, queries: Tensor, responses: Tensor, scores: Tensor) -> dict[str, Any]:
        """Make one PPO step on queries [B, Q], responses [B, R] and scores [B]; returns stats."""


def parse_arguments() -> argparse.Namespace:
    """Read the workload from the command line; `peers.py` gives the same one to every worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--minibatch-size", type=int, default=8)
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--query-length", type=int, default=8)
    parser.add_argument("--response-length", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build_config(arguments: argparse.Namespace) -> GPT2Config:
    """GPT-2 of 124M parameters (with the default 12 layers), without dropout and without an EOS."""
    return GPT2Config(
        n_layer=arguments.layers,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Give a model the same random weights whatever versions built it."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(model.named_parameters()):
        if "ln_" in name:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value.zero_()
        else:
            value.normal_(std=0.02, generator=generator)


def make_batch(
    arguments: argparse.Namespace, vocabulary: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, Q], responses [B, R] and scores [B] of iteration `number`."""
    generator = torch.Generator().manual_seed(1000 + number)
    rows = arguments.batch_size
    length = arguments.query_length + arguments.response_length
    tokens = torch.randint(1, vocabulary, (rows, length), generator=generator)
    scores = torch.randn(rows, generator=generator)
    return *tokens.split((arguments.query_length, arguments.response_length), dim=1), scores


def count_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates the optimiser has made."""
    return int(max((float(state["step"]) for state in optimizer.state.values()), default=0))


def serve(build: Callable[[argparse.Namespace, GPT2Config], Side], packages: list[str]) -> None:
    """Build the side, then run and time one iteration for each line on standard input.

    All sides train on the same tokens: what `generate` sampled is timed and checked for its
    shape, and the step then gets the responses of `make_batch`.
    """
    # Libraries print to standard output; what they print must not reach the parent.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = build_config(arguments)
    side = build(arguments, config)
    report(channel, {"packages": {name: version(name) for name in packages}})
    for number, _ in enumerate(sys.stdin):
        queries, responses, scores = make_batch(arguments, config.vocab_size, number)
        before = count_updates(side.optimizer)
        start = time.perf_counter()
        sampled = side.generate(queries, arguments.response_length)
        generated = time.perf_counter()
        stats = side.step(queries, responses, scores)
        end = time.perf_counter()
        assert sampled.shape == responses.shape, sampled.shape
        compared = {key: float(torch.as_tensor(stats[key]).mean()) for key in STATS_TO_COMPARE}
        report(
            channel,
            {
                "generate_s": generated - start,
                "step_s": end - generated,
                "iteration_s": end - start,
                "peak_rss_gib": peak_memory(),
                "updates": count_updates(side.optimizer) - before,
                "stats": compared,
            },
        )


def report(channel: Any, message: dict[str, Any]) -> None:
    """Send one line of JSON to the parent."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def peak_memory() -> float:
    """Return the most memory this process ever had resident, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * GIB_PER_MAXRSS
