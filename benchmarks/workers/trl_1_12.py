"""The side of `trl==1.12.0`, whose PPO (`trl.experimental.ppo`) has a loop of its own: `train()`.

It samples, asks a reward model, makes the updates and begins again, so it trains on what it has
sampled: rows, lengths and updates are those of the workload, the tokens are not the prepared ones.
A callback ends an iteration where the trainer ends a step, and waits there for the next line on
standard input; what is left of a step after the callback is counted with the next one. Of its
phases only generation can be told apart, by timing the policy's `generate`.

As it is meant to be used: value and reward models are models of their own. The value model is as
large as the policy and trained with it, so that nearly twice as many weights are. The reward model
is tiny, so as to cost nothing, and so is the time it takes.

At its best: no gradient checkpointing (it is on by default), all rows in one pass of no-grad work,
the fused AdamW that is its default. Mixed precision is asked for as `accelerate launch` does;
with these versions `bf16=True` alone leaves everything in float32. It reaches the updates only:
generation, the reference and the first values are computed in float32. With `--tuned` they too run
under autocast, which a user could add from outside.

Responses can only be of one length or end with an EOS that the policy samples, which random weights
do not. For a workload of ragged lengths the tokens after each row's length are therefore replaced
by padding, which is what `generate` does behind an EOS.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from side import (
    Channel,
    argument_parser,
    build_config,
    build_language_model,
    count_parameters,
    count_updates,
    fill_weights,
    make_batch,
    matmul_gflops,
    peak_memory,
    speeds,
    wait,
)
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from workloads import Workload

warnings.simplefilter("ignore")

MANY = 10_000
"""Iterations that the trainer is told to make; it ends when standard input does."""


class Iterations(TrainerCallback):
    """Runs one iteration for each line on standard input and reports what it took."""

    def __init__(self, arguments: argparse.Namespace, channel: Channel) -> None:
        self.workload = arguments.workload
        self.precision = arguments.precision
        self.matmul_size = arguments.matmul_size
        self.device = arguments.device
        self.channel = channel
        self.parameters = count_parameters(self.workload)
        self.optimizer: Any = None
        self.generate_s = 0.0
        self.sampled_tokens = self.trained_tokens = 0
        self.stats: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first line."""
        self.wait()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep the stats."""
        self.stats = {key: value for key, value in logs.items() if "/" in key}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report this iteration and wait for the next."""
        wait(self.device)
        iteration_s = time.perf_counter() - self.start
        peak = max(self.peak, matmul_gflops(self.precision, self.matmul_size, self.device))
        seconds = {
            "generate_s": self.generate_s,
            "step_s": iteration_s - self.generate_s,
            "iteration_s": iteration_s,
            "forward_s": None,
            "optimize_s": None,
        }
        self.channel.report(
            {
                **seconds,
                **peak_memory(self.device),
                "updates": count_updates(self.optimizer) - self.updates_before,
                "sampled_tokens": self.sampled_tokens,
                "trained_tokens": self.trained_tokens,
                **speeds(self.workload, self.parameters, seconds, peak),
                "stats": self.stats,
            }
        )
        self.wait()

    def wait(self) -> None:
        """Wait for a line, then start the clock."""
        if not sys.stdin.readline():
            raise EOFError
        self.generate_s = 0.0
        self.sampled_tokens = self.trained_tokens = 0
        self.updates_before = count_updates(self.optimizer)
        self.peak = matmul_gflops(self.precision, self.matmul_size, self.device)
        self.start = time.perf_counter()

    def watch(self, policy: PreTrainedModel) -> None:
        """Time the policy's `generate`, and cut the rows to their lengths."""
        generate = policy.generate
        lengths = torch.tensor(self.workload.response_lengths, device=self.device)

        def timed(**kwargs: Any) -> Any:
            wait(self.device)
            start = time.perf_counter()
            output = generate(**kwargs)
            wait(self.device)
            self.generate_s += time.perf_counter() - start
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            responses = sequences[:, kwargs["input_ids"].shape[1] :]
            self.sampled_tokens += responses.numel()
            columns = torch.arange(responses.shape[1], device=self.device)
            behind = columns >= lengths[:, None]
            responses.masked_fill_(behind, 0)  # a view: the sequences change
            self.trained_tokens += int((~behind).sum())
            return output

        policy.generate = timed


def build_trainer(arguments: argparse.Namespace, iterations: Iterations) -> PPOTrainer:
    """Return the trainer for the workload."""
    workload = arguments.workload
    policy, reference = (build_language_model(workload) for _ in range(2))
    value_model = build_value_model(workload)
    reward_model = build_reward_model(workload)
    if arguments.tuned and arguments.precision == "bf16":
        policy.generate = in_autocast(policy.generate, arguments.device)
        for model in (reference, getattr(value_model, value_model.base_model_prefix)):
            model.forward = in_autocast(model.forward, arguments.device)
    iterations.watch(policy)
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=arguments.device == "cpu",
        bf16=arguments.precision == "bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=workload.batch_size,
        # Not gradient accumulation: it would make one update of so many minibatches.
        num_mini_batches=workload.batch_size // workload.minibatch_size,
        num_ppo_epochs=workload.ppo_epochs,
        local_rollout_forward_batch_size=workload.batch_size,
        response_length=workload.response_length[1],
        temperature=1.0,
        total_episodes=MANY * workload.batch_size,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        settings,
        build_tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=build_dataset(workload),
        callbacks=[iterations],
    )
    trainer.remove_callback(PrinterCallback)
    wanted = "bf16" if arguments.precision == "bf16" else "no"
    assert trainer.accelerator.mixed_precision == wanted, trainer.accelerator.mixed_precision
    iterations.optimizer = trainer.optimizer
    return trainer


def in_autocast(function: Any, device: str) -> Any:
    """Return the function, run in bfloat16."""
    return torch.autocast(device, torch.bfloat16)(function)


def build_value_model(workload: Workload) -> PreTrainedModel:
    """Return a model like the policy, with the same weights and a value head that starts at 0."""
    config = build_config(workload)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    fill_weights(model)
    nn.init.zeros_(model.score.weight)
    return model


def build_reward_model(workload: Workload) -> PreTrainedModel:
    """Return a reward model that is too small to count."""
    config = GPT2Config(
        n_layer=1,
        n_embd=8,
        n_head=1,
        n_positions=workload.positions,
        vocab_size=workload.vocabulary,
        num_labels=1,
    )
    return GPT2ForSequenceClassification(config)


def build_dataset(workload: Workload) -> Dataset:
    """Return the queries of one batch, which the trainer takes in another order each iteration."""
    return Dataset.from_dict(
        {"input_ids": [query.tolist() for query in make_batch(workload, 0).queries]}
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer that the trainer insists on; only its padding token is used."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", padding_side="left"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser()
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--grpo", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train until there are no more lines."""
    arguments = parse_arguments()
    channel = Channel()
    if arguments.precision == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.grpo:
        from trl_grpo import Rounds, build_grpo_trainer

        trainer = build_grpo_trainer(arguments, Rounds(arguments, channel))
    else:
        trainer = build_trainer(arguments, Iterations(arguments, channel))
    packages = ["trl", "transformers", "accelerate", "torch"]
    channel.introduce(arguments.workload, packages, arguments.device, same_tokens=False)
    with contextlib.suppress(EOFError):
        trainer.train()


if __name__ == "__main__":
    main()
