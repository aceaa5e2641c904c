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
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from workloads import Workload

GIB_PER_MAXRSS = 1 / 2**30 if sys.platform == "darwin" else 1 / 2**20
STATS_TO_COMPARE = (
    "objective/entropy",
    "objective/kl",
    "ppo/returns/mean",
    "ppo/loss/value",
    "ppo/policy/approxkl",
)
"""Numbers that the trainers with a `step` define alike. The last two depend on how the minibatches
were shuffled, unless there is only one; the others must be equal in the first iteration."""


@dataclass(frozen=True)
class Batch:
    """What one iteration is about."""

    queries: list[Tensor]
    """B tensors of token ids; those of a group are adjacent and equal."""
    responses: list[Tensor]
    """B tensors of token ids, which a side that trains on prepared tokens trains on."""
    scores: Tensor
    """[B]."""

    def to(self, device: str) -> Batch:
        """Return the same batch on a device."""
        rows = ([row.to(device) for row in column] for column in (self.queries, self.responses))
        return Batch(*rows, self.scores.to(device))

    @property
    def lengths(self) -> list[int]:
        """Length of each response."""
        return [len(response) for response in self.responses]


class Side(ABC):
    """One contender: a model, its frozen reference and a PPO trainer around them."""

    optimizer: torch.optim.Optimizer
    same_tokens: bool = True
    """Whether it trains on the prepared responses; its stats must then equal the others'."""
    trains_all: bool = True
    """Whether all weights are trained; 6 operations for each weight and token assume that."""

    @abstractmethod
    def generate(self, batch: Batch) -> list[Tensor]:
        """Sample a response to each query, at least as long as the prepared one."""

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, Any]:
        """Make one PPO step; returns the stats."""


# -- the common work -------------------------------------------------------------------------------


def build_config(workload: Workload) -> PretrainedConfig:
    """Return the model's configuration, without dropout and without an EOS."""
    if workload.family == "llama":
        return LlamaConfig(
            num_hidden_layers=workload.layers,
            hidden_size=workload.width,
            num_attention_heads=workload.heads,
            num_key_value_heads=workload.key_value_heads,
            intermediate_size=workload.inner,
            vocab_size=workload.vocabulary,
            max_position_embeddings=workload.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    return GPT2Config(
        n_layer=workload.layers,
        n_embd=workload.width,
        n_head=workload.heads,
        n_positions=workload.positions,
        vocab_size=workload.vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_language_model(workload: Workload) -> PreTrainedModel:
    """Return the language model with the weights that every side gets."""
    model = AutoModelForCausalLM.from_config(build_config(workload))
    fill_weights(model)
    return model


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Give a model the same random weights whatever versions built it."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(model.named_parameters()):
        if "ln_" in name or "norm" in name:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value.zero_()
        else:
            value.normal_(std=0.02, generator=generator)


def count_parameters(workload: Workload) -> dict[str, int]:
    """Return the parameters of the model: all, those of its layers, those of its head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(workload))
    parameters = dict(model.named_parameters())  # what is tied comes up once
    total = sum(value.numel() for value in parameters.values())
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    outside = sum(
        value.numel() for name, value in parameters.items() if id(value) in tables or "wpe" in name
    )
    head = model.get_output_embeddings().weight.numel()
    return {"all": total, "body": total - outside, "head": head}


def make_batch(workload: Workload, number: int) -> Batch:
    """Return queries, responses and scores of iteration `number`; its lengths are always those."""
    generator = torch.Generator().manual_seed(1000 + number)

    def draw(length: int) -> Tensor:
        return torch.randint(1, workload.vocabulary, (length,), generator=generator)

    queries: list[Tensor] = []
    for length in workload.query_lengths[:: workload.group_size]:
        queries += [draw(length)] * workload.group_size
    responses = [draw(length) for length in workload.response_lengths]
    return Batch(queries, responses, torch.randn(workload.batch_size, generator=generator))


# -- what is measured ------------------------------------------------------------------------------


def count_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates the optimiser has made."""
    return int(max((float(state["step"]) for state in optimizer.state.values()), default=0))


def peak_memory(device: str) -> dict[str, float | None]:
    """Return the most memory that this process ever had, resident and on the GPU, in GiB."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * GIB_PER_MAXRSS,
        "peak_gpu_gib": on_gpu,
    }


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given: until then no clock tells its time."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_gflops(precision: str, size: int, device: str, times: int = 4) -> float:
    """Return the 10⁹ operations a second of the best of several products of two size² matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(1 + times):  # the first makes the caches warm
        wait(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def speeds(
    workload: Workload,
    parameters: dict[str, int],
    seconds: dict[str, float | None],
    gflops: float,
    *,
    trains_all: bool = True,
) -> dict[str, Any]:
    """Return tokens a second of each phase and the share of the machine's peak in the optimisation.

        share = 6 · (body · tokens + head · response tokens) · epochs / seconds / peak

    Tokens are those of the workload, padding and whatever else a side computes left out. The
    no-grad pass counts each token of the batch once, whether one model or two are run. Where a
    trainer does not tell the seconds of its optimisation, the share is of its whole step
    (`share_of_peak_in`). What is saved by computing a query once for its group counts as done, so
    that the share can exceed 1.

    Args:
        workload: The work.
        parameters: See `count_parameters`.
        seconds: generate_s, step_s, forward_s, optimize_s; None: not known.
        gflops: See `matmul_gflops`.
        trains_all: Else the share is not known: fewer operations are needed.
    """

    def per_second(tokens: int, name: str) -> float | None:
        return tokens / seconds[name] if seconds[name] else None

    within = "optimize_s" if seconds["optimize_s"] else "step_s"
    operations = 6 * workload.ppo_epochs
    operations *= (
        parameters["body"] * workload.tokens + parameters["head"] * workload.response_tokens
    )
    known = trains_all and seconds[within]
    return {
        "generate_tokens_per_s": per_second(workload.response_tokens, "generate_s"),
        "forward_tokens_per_s": per_second(workload.tokens, "forward_s"),
        "optimize_tokens_per_s": per_second(workload.tokens * workload.ppo_epochs, "optimize_s"),
        "matmul_gflops": gflops,
        "share_of_peak": operations / seconds[within] / gflops / 1e9 if known else None,
        "share_of_peak_in": within if known else None,
    }


def run_iteration(
    side: Side,
    workload: Workload,
    number: int,
    *,
    precision: str,
    matmul_size: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run and time iteration `number` of a side with a `step`.

    On a GPU the phases of the step are not known: they do not wait for it.

    What `generate` sampled is timed and checked for its lengths; the step then gets the responses
    of `make_batch`, unless the side goes on with its own, which have the same lengths.
    """
    batch = make_batch(workload, number).to(device)
    before = count_updates(side.optimizer)
    peak = matmul_gflops(precision, matmul_size, device)
    start = time.perf_counter()
    sampled = side.generate(batch)
    wait(device)
    generated = time.perf_counter()
    stats = side.step(batch)
    wait(device)
    end = time.perf_counter()
    peak = max(peak, matmul_gflops(precision, matmul_size, device))
    enough = (len(s) >= length for s, length in zip(sampled, batch.lengths, strict=True))
    assert all(enough), [len(response) for response in sampled]
    seconds = {
        "generate_s": generated - start,
        "step_s": end - generated,
        "iteration_s": end - start,
        "forward_s": seconds_of(stats, "time/ppo/forward_pass") if device == "cpu" else None,
        "optimize_s": seconds_of(stats, "time/ppo/optimize_step") if device == "cpu" else None,
    }
    parameters = count_parameters(workload)
    trained = batch.responses if side.same_tokens else sampled
    return {
        **seconds,
        **peak_memory(device),
        "updates": count_updates(side.optimizer) - before,
        "sampled_tokens": sum(len(response) for response in sampled),
        "trained_tokens": sum(len(response) for response in trained),
        **speeds(workload, parameters, seconds, peak, trains_all=side.trains_all),
        "stats": {
            key: float(torch.as_tensor(stats[key]).mean())
            for key in STATS_TO_COMPARE
            if key in stats  # without a critic some are not
        },
    }


def seconds_of(stats: dict[str, Any], name: str) -> float | None:
    """Return a time from the stats of a step, if it is among them."""
    return float(stats[name]) if name in stats else None


# -- talking to the driver -------------------------------------------------------------------------


def argument_parser() -> argparse.ArgumentParser:
    """Return the options that every worker has; `peers.py` gives all of them the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--workload", type=Workload.from_json, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matmul-size", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


class Channel:
    """The way to the driver: lines of JSON on what was standard output when the worker began."""

    def __init__(self) -> None:
        # Libraries print to standard output; what they print must not reach the driver.
        self.stream = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def report(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def introduce(
        self, workload: Workload, packages: list[str], device: str, *, same_tokens: bool
    ) -> None:
        """Say what the worker is, before its first iteration."""
        self.report(
            {
                "device": torch.cuda.get_device_name() if device == "cuda" else device,
                "packages": {name: version(name) for name in packages},
                "parameters": count_parameters(workload),
                "same_tokens": same_tokens,
            }
        )


def serve(
    build: Callable[[argparse.Namespace], Side],
    arguments: argparse.Namespace,
    packages: list[str],
) -> None:
    """Build a side with a `step`, then run one iteration for each line on standard input."""
    channel = Channel()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    side = build(arguments)
    channel.introduce(arguments.workload, packages, arguments.device, same_tokens=side.same_tokens)
    for number, _ in enumerate(sys.stdin):
        channel.report(
            run_iteration(
                side,
                arguments.workload,
                number,
                precision=arguments.precision,
                matmul_size=arguments.matmul_size,
                device=arguments.device,
            )
        )
