"""The loop: rollout, evaluation, optimisation, again and again; and `train`, all of it in one call.

model, history = trl.train(
    model="gpt2", prompts=["This film was"], reward=lambda texts: [float(len(t)) for t in texts]
)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl.config import PPOConfig
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer, score
from trl.models.reference import ReferenceKind
from trl.models.with_value_head import load_policy
from trl.optimization.adam import linear_decay
from trl.ppo import PPOTrainer
from trl.rollout.queries import Chat
from trl.rollout.sampler import Sampler

Row = dict[str, float]
"""Figures of one step, by name."""


class Trained(NamedTuple):
    """What `train` returns."""

    model: nn.Module
    """The tuned policy; `.save_pretrained` writes a folder that plain transformers loads."""
    history: list[Row]
    """A row of figures for each step."""


class Loop:
    """The three steps on batches of prompts; every prompt comes up once before any comes again.

    Args:
        trainer: Its policy writes the responses.
        sampler: Its temperature must be the trainer's.
        scorer: Judges them.
        prompts: Whatever the sampler takes.
        total_steps: The learning rate falls linearly to 0 over so many steps, as in Ziegler et
            al.; None: it stays.

    Raises:
        ValueError: if the parts do not fit together.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        sampler: Sampler,
        scorer: Scorer,
        prompts: Sequence[str] | Sequence[Chat] | Sequence[Tensor],
        *,
        total_steps: int | None = None,
    ) -> None:
        self.trainer, self.sampler, self.scorer = trainer, sampler, scorer
        self.prompts = list(prompts)
        config = trainer.config
        if not self.prompts:
            raise ValueError("`prompts` must have at least one entry, got none.")
        if sampler.distribution.temperature != config.temperature:
            raise ValueError(
                "`temperature` must be the same for sampler and trainer, got "
                f"{sampler.distribution.temperature} and {config.temperature}."
            )
        self.processes = trainer.accelerator.num_processes
        if config.batch_size % (sampler.group_size * self.processes):
            raise ValueError(
                f"`batch_size` must be a multiple of group_size × processes, got "
                f"{config.batch_size} for {sampler.group_size} × {self.processes}."
            )
        self.prompts_per_step = config.batch_size // sampler.group_size
        self.schedule = None
        if total_steps is not None:
            # Each process steps its own; accelerate's wrapper would count for all of them.
            optimizer = trainer.optimizer.optimizer
            self.schedule = LambdaLR(optimizer, partial(linear_decay, total_steps=total_steps))
        self._order: list[int] = []
        self._shuffle = torch.Generator().manual_seed(config.seed)

    def step(self) -> Row:
        """Roll out, evaluate, optimise; return what is worth a row of figures."""
        started = time.perf_counter()
        prompts = self._next_prompts()
        with self.trainer.sampling():
            rollout = self.sampler(self.trainer.model, prompts)
        sampled = time.perf_counter()
        scores = score(self.scorer, rollout)
        scored = time.perf_counter()
        stats = self.trainer.step(rollout, scores)
        if self.schedule is not None:
            self.schedule.step()
        ended = time.perf_counter()
        totals = scores if scores.ndim == 1 else scores.sum(1)
        figures = {name: value for name, value in stats.items() if isinstance(value, float)}
        parts = getattr(self.scorer, "means", {})  # of a WeightedSum
        return {
            "reward/mean": totals.mean().item(),
            "reward/std": totals.std(correction=0).item(),
            **{f"reward/{name}": mean for name, mean in parts.items()},
            "response/length": rollout.response_mask.sum(1).float().mean().item(),
            "response/ended": rollout.ended.float().mean().item(),
            **figures,
            "time/rollout": sampled - started,
            "time/evaluation": scored - sampled,
            "time/optimisation": ended - scored,
            "tokens_per_second": int(rollout.response_mask.sum()) / (ended - started),
        }

    def _next_prompts(self) -> list[Any]:
        """Return this process's share of the next batch."""
        while len(self._order) < self.prompts_per_step:
            again = torch.randperm(len(self.prompts), generator=self._shuffle)
            self._order += again.tolist()
        size = self.prompts_per_step
        chosen, self._order = self._order[:size], self._order[size:]
        share = chosen[self.trainer.accelerator.process_index :: self.processes]
        return [self.prompts[index] for index in share]


def train(
    model: str | os.PathLike[str] | nn.Module,
    prompts: Sequence[str] | Sequence[Chat] | Sequence[Tensor],
    reward: Scorer | Callable[[list[str]], Any],
    *,
    steps: int = 100,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    config: PPOConfig | None = None,
    ref_model: nn.Module | ReferenceKind | None = None,
    peft_config: Any = None,
    unfrozen_layers: int | None = None,
    on_step: Callable[[int, Row], Any] | None = None,
    max_new_tokens: int | tuple[int, int] = 24,
    decay_learning_rate: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    sampler_kwargs: dict[str, Any] | None = None,
    **ppo_params: Any,
) -> Trained:
    """Tune a language model by PPO: sample responses to the prompts, score them, learn, repeat.

    Args:
        model: Hub name or folder of any causal or encoder-decoder model, or a loaded one.
        prompts: Texts, chats (lists of messages), or tensors of token ids.
        reward: A function from the B texts (query and response) to B numbers, or any scorer of
            `trl.evaluation`.
        steps: PPO steps, each on `batch_size` responses.
        tokenizer: The policy's. None: the one beside the model.
        config: Settings of PPO. None: the defaults, changed by `ppo_params`.
        ref_model: See `PPOTrainer`.
        peft_config: Train an adapter (`peft.LoraConfig` and others) rather than the model.
        unfrozen_layers: Train the top k layers only.
        on_step: Called as on_step(step, row) after each step, step counting from 1; stops the
            training if it returns True.
        max_new_tokens: Most tokens of a response, or (shortest, longest) for a random limit.
        decay_learning_rate: Let the learning rate fall linearly to 0.
        model_kwargs: Passed to `from_pretrained`: dtype, device_map, revision, ….
        sampler_kwargs: Passed to `Sampler`: group_size, stop_strings, add_bos, max_rows, ….
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020.

    Returns:
        The tuned model and a row of figures for each step.

    Raises:
        TypeError, ValueError: for settings that cannot work, before anything is trained.
        ScoringError: if the reward fails; the model is then as after the last whole step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a whole number > 0, got {steps!r}.")
    if config is not None and ppo_params:
        raise TypeError(
            f"pass settings in `config` or as keyword arguments, not both; got "
            f"{sorted(ppo_params)} beside `config`: use dataclasses.replace(config, ...)."
        )
    config = config or PPOConfig.from_kwargs(**ppo_params)
    scorer = as_scorer(reward)
    prompts = list(prompts)
    policy = load_policy(
        model, peft_config=peft_config, unfrozen_layers=unfrozen_layers, **model_kwargs or {}
    )
    trainer = PPOTrainer(policy, ref_model, config)
    settings = {"temperature": config.temperature, "seed": config.seed} | (sampler_kwargs or {})
    # Every process draws from its own random numbers.
    settings["seed"] = settings["seed"] * trainer.accelerator.num_processes
    settings["seed"] += trainer.accelerator.process_index
    sampler = Sampler(
        _tokenizer(tokenizer, model, policy, prompts), max_new_tokens=max_new_tokens, **settings
    )
    loop = Loop(
        trainer, sampler, scorer, prompts, total_steps=steps if decay_learning_rate else None
    )
    history: list[Row] = []
    for step in range(1, steps + 1):
        row = {"step": float(step)} | loop.step()
        history.append(row)
        if on_step is not None and on_step(step, row):
            break
    return Trained(policy, history)


def _tokenizer(
    given: PreTrainedTokenizerBase | str | None,
    model: Any,
    policy: nn.Module,
    prompts: list[Any],
) -> PreTrainedTokenizerBase | None:
    """Return the policy's tokenizer: the one given, or the one beside the model."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    beside = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    name = given or beside or policy.config.name_or_path
    tokens_only = bool(prompts) and isinstance(prompts[0], Tensor)
    try:
        return AutoTokenizer.from_pretrained(os.fspath(name))
    except (OSError, ValueError) as error:
        if given is None and tokens_only:
            return None  # nothing asks for one, unless the reward reads text, and then says so
        raise ValueError(
            f"`tokenizer` must be given: there is none beside the model ({name!r})."
        ) from error
