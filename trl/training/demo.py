"""`trl demo`: tune a language model to write positive film reviews.

The three steps of PPO for language models, on two small models that ship with the package:

    rollout        the language model continues the beginning of a review
    evaluation     a sentiment classifier reads the text; its positive logit is the score
    optimisation   `PPOTrainer.step`

The folder of the run holds config.json, metrics.jsonl (a line for each step), samples.jsonl and
samples.md (held-out prompts before and after), summary.json, learning_curve.png and policy/ (which
plain transformers loads).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trl import starter
from trl.config import DemoConfig
from trl.evaluation.classifier import ClassifierScorer
from trl.evaluation.scores import score
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.rollout.sampler import Sampler
from trl.training.loop import Loop
from trl.training.report import (
    before_after_summary,
    plot_learning_curve,
    samples_markdown,
    samples_table,
    summary_markdown,
    summary_table,
)

SHOWN = 8
"""Samples shown at the end."""


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Tune, measure on held-out prompts before and after, save and show.

    Returns:
        The summary: reward/mean, reward/median, positive, kl, distinct_2, each (before, after).
    """
    started = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)  # before anything slow: is there a place to write?
    config = replace(config, ppo=replace(config.ppo, seed=config.seed))
    torch.manual_seed(config.seed)

    with _quiet_transformers():
        run = DemoRun.load(config)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    console.print(
        f"Policy {config.model or 'starter GPT-2'}: "
        f"{run.policy.num_parameters() / 1e6:.1f}M parameters, precision "
        f"{run.trainer.precision.replace('no', 'fp32')}, "
        f"{len(run.train_prompts)} prompts to train on, {len(run.held_out_prompts)} held out."
    )
    before = run.measure()
    metrics = [{"step": 0} | before.metrics()]
    with (out / "metrics.jsonl").open("w") as lines, _progress(console, config.steps) as show:
        _write_line(lines, metrics[0])
        for step in range(1, config.steps + 1):
            row = {"step": step} | run.step()
            if step % config.eval_every == 0 and step < config.steps:
                row |= run.measure().metrics()
            metrics.append(row)
            _write_line(lines, row)
            show(row)
        after = run.measure()
        metrics.append({"step": config.steps} | after.metrics())
        _write_line(lines, metrics[-1])

    summary = before_after_summary(
        scores=(before.scores, after.scores),
        positive=(before.positive, after.positive),
        kl=(before.kl, after.kl),
        tokens=(before.tokens, after.tokens),
    )
    samples = [
        {
            "prompt": prompt,
            "before": before.texts[row],
            "score_before": before.scores[row],
            "after": after.texts[row],
            "score_after": after.scores[row],
        }
        for row, prompt in enumerate(run.held_out_prompts)
    ]
    seconds = time.perf_counter() - started
    _write(out, run, summary | {"seconds": seconds}, samples)
    plot_learning_curve(metrics, out / "learning_curve.png")
    console.print(samples_table(samples[:SHOWN]), summary_table(summary))
    console.print(
        f"{config.steps} steps in {seconds / 60:.1f} minutes. Everything is in {out}/: samples.md, "
        "learning_curve.png, metrics.jsonl, and the tuned model in policy/."
    )
    if config.profile is not None:
        console.print(f"Where the time went is in {config.profile}/: profile.md, and traces.")
    return summary


@dataclass
class Measurement:
    """What the policy writes on the held-out prompts, and how it is judged; one entry a prompt."""

    texts: list[str]
    tokens: list[list[int]]
    scores: list[float]
    positive: list[float]
    """P(label) by the classifier."""
    kl: list[float]
    """Σ_t (log π − log π_ref), in nats."""

    def metrics(self) -> dict[str, float]:
        """Return the means, as they stand in metrics.jsonl."""
        summary = before_after_summary(
            scores=(self.scores, self.scores),
            positive=(self.positive, self.positive),
            kl=(self.kl, self.kl),
            tokens=(self.tokens, self.tokens),
        )
        return {f"held_out/{name}": value for name, (value, _) in summary.items()}


class DemoRun:
    """The models, prompts and random state of one demo."""

    def __init__(
        self,
        config: DemoConfig,
        tokenizer: PreTrainedTokenizerBase,
        policy: nn.Module,
        scorer: ClassifierScorer,
        train_prompts: list[str],
        held_out_prompts: list[str],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.policy = policy
        self.scorer = scorer
        self.probability = ClassifierScorer(
            scorer.model, scorer.tokenizer, label=config.label, output="probability"
        )
        self.trainer = PPOTrainer(policy, config=config.ppo)
        self.train_prompts, self.held_out_prompts = train_prompts, held_out_prompts
        self.loop = Loop(
            self.trainer,
            self._sampler(config.seed),
            scorer,
            train_prompts,
            total_steps=config.steps,
            profile=config.profile,
        )
        self.step = self.loop.step

    @classmethod
    def load(cls, config: DemoConfig) -> DemoRun:
        """Load what the config names, or the starter models and prompts."""
        train, held_out = _prompts(config)
        name = config.model or str(starter.LANGUAGE_MODEL)
        scorer = ClassifierScorer(
            config.reward_model or str(starter.CLASSIFIER),
            label=config.label,
            output=config.reward,
        )
        policy = load_policy(name)
        return cls(config, AutoTokenizer.from_pretrained(name), policy, scorer, train, held_out)

    def measure(self) -> Measurement:
        """Judge one response to each held-out prompt; the same random numbers every time."""
        trainer = self.trainer
        with trainer.sampling():
            rollout = self._sampler(self.config.seed + 1)(self.policy, self.held_out_prompts)
        old = trainer.forward_pass(trainer.policy, rollout)
        kl = (old.logprobs - trainer.reference_logprobs(rollout, old)).sum(1)
        return Measurement(
            texts=list(rollout.response_texts),
            tokens=rollout.response_lists(),
            scores=score(self.scorer, rollout).tolist(),
            positive=score(self.probability, rollout).tolist(),
            kl=kl.tolist(),
        )

    def _sampler(self, seed: int) -> Sampler:
        return Sampler(
            self.tokenizer,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.ppo.temperature,
            seed=seed,
            add_bos=self.tokenizer.bos_token_id is not None,
        )


def _prompts(config: DemoConfig) -> tuple[list[str], list[str]]:
    """Return the prompts to train on and those held out."""
    if config.prompts is None:
        train, held_out = starter.prompts("train"), starter.prompts("held-out")
        if config.held_out > len(held_out):
            raise ValueError(
                f"`held_out` must be at most {len(held_out)}, the held-out prompts that ship "
                f"with trl, got {config.held_out}."
            )
        return train, held_out[: config.held_out]
    lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    unique = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(unique) <= config.held_out:
        raise ValueError(
            f"`prompts` must name a file with more different lines than are held out "
            f"({config.held_out}), got {len(unique)}: add prompts or lower `held_out`."
        )
    return unique[: -config.held_out], unique[-config.held_out :]


def _write(out: Path, run: DemoRun, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with (out / "samples.jsonl").open("w") as lines:
        for sample_row in samples:
            _write_line(lines, sample_row)
    tables = {name: value for name, value in summary.items() if name != "seconds"}
    (out / "samples.md").write_text(summary_markdown(tables) + "\n" + samples_markdown(samples))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with _quiet_transformers():
        run.policy.save_pretrained(out / "policy")
    run.tokenizer.save_pretrained(out / "policy")


def _write_line(lines: Any, row: dict[str, Any]) -> None:
    lines.write(json.dumps(row) + "\n")
    lines.flush()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the loading bars of transformers off the screen."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Any]:
    """Yield a function that shows a row of metrics: a live bar, or a line now and then in a log."""
    bar = Progress(
        TextColumn("PPO"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=steps, figures="")
    started = time.perf_counter()

    def show(row: dict[str, float]) -> None:
        step = int(row["step"])
        figures = (
            f"reward {row['reward/mean']:+.2f} · KL {row['objective/kl']:.1f} nats · "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        bar.update(task, advance=1, figures=figures)
        if not console.is_terminal and (step == 1 or step % max(1, steps // 15) == 0):
            left = (time.perf_counter() - started) / step * (steps - step)
            console.print(f"step {step}/{steps} · {figures} · {left:.0f} s left")

    with bar:
        yield show
