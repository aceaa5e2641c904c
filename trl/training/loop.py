"""The loop: rollout, evaluation, optimisation, again and again; and `train`, all of it in one call.

model, history = trl.train(
    model="gpt2", prompts=["This film was"], reward=lambda texts: [float(len(t)) for t in texts]
)
"""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl.anatomy import language_model
from trl.batch import Rollout
from trl.config import PPOConfig, closest
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer
from trl.models.checkpoint import hub_arguments
from trl.models.reference import ReferenceKind
from trl.models.with_value_head import load_policy
from trl.optimization.adam import linear_decay
from trl.ppo import PPOTrainer
from trl.rollout.queries import Chat, listed
from trl.rollout.sampler import Sampler
from trl.training.overlap import Judged, Overlap, judge
from trl.training.parts import quiet_transformers, seeded
from trl.watch.profile import Profile

Row = dict[str, float]
"""Figures of one step, by name."""


class Trained(NamedTuple):
    """What `train` returns."""

    model: nn.Module
    """The tuned policy; `.save_pretrained` writes a folder that plain transformers loads, with the
    tokenizer of the training."""
    history: list[Row]
    """A row of figures for each step."""


class Loop:
    """The three steps on batches of prompts; every prompt comes up once before any comes again.

    Args:
        trainer: Its policy writes the responses.
        sampler: Its temperature must be the trainer's.
        scorer: Judges them.
        prompts: Whatever the sampler takes; all of them are looked at here, before any is used.
        schedule: Factor on the learning rate of step 0, 1, …; None: it stays as it is.
        parts: Write each batch in so many parts, and score one while the next is written: for a
            scorer that waits for a server. It must not compare the responses of a whole batch.
        profile: A folder for where the time goes, see `trl.watch.profile`; the first process
            writes it. None: it is not looked at, which costs nothing.

    Attributes:
        steps_done: Steps so far.
        rollout: This process's rollout of the last step.
        scores: [B] their scores.
        all_scores: Those of all processes.

    Raises:
        TypeError: if the prompts are not a list of prompts.
        ValueError: if the parts do not fit together, or a prompt does not fit the policy.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        sampler: Sampler,
        scorer: Scorer,
        prompts: Sequence[str] | Sequence[Chat] | Sequence[Tensor],
        *,
        schedule: Callable[[int], float] | None = None,
        parts: int = 1,
        profile: str | os.PathLike[str] | None = None,
    ) -> None:
        self.trainer, self.sampler, self.scorer = trainer, sampler, scorer
        self.prompts = checked_prompts(prompts)
        config = trainer.config
        if sampler.distribution.temperature != config.temperature:
            raise ValueError(
                "`temperature` must be the same for sampler and trainer, got "
                f"{sampler.distribution.temperature} and {config.temperature}."
            )
        if trainer.algorithm.groups and sampler.group_size < 2:
            raise ValueError(
                f"`group_size` must be > 1 with algorithm={config.algorithm!r}, which compares the "
                f"responses to one prompt, got {sampler.group_size}: pass Sampler(group_size=4), "
                'or to train sampler_kwargs={"group_size": 4}.'
            )
        self.processes = trainer.accelerator.num_processes
        if config.batch_size % (sampler.group_size * self.processes):
            raise ValueError(
                f"`batch_size` must be a multiple of group_size × processes, got "
                f"{config.batch_size} for {sampler.group_size} × {self.processes}."
            )
        sampler.check(trainer.model, self.prompts, name="prompts")
        self.prompts_per_step = config.batch_size // sampler.group_size
        check_parts(parts, self.prompts_per_step // self.processes)
        self.parts = parts
        self.schedule = schedule
        self.rates = [group["lr"] for group in trainer.optimizer.param_groups]
        self.steps_done = 0
        self.rollout: Rollout | None = None
        self.scores = self.all_scores = torch.empty(0)
        self.profile = None
        if profile is not None and trainer.accelerator.is_main_process:
            self.profile = Profile(profile, trainer)
        self._order: list[int] = []
        self._shuffle = torch.Generator().manual_seed(config.seed)

    def step(self) -> Row:
        """Roll out, evaluate, optimise; return what is worth a row of figures.

        A step that fails can be called again: it takes the same prompts and random numbers.
        """
        before = self._order, self._shuffle.get_state(), self.sampler.calls
        try:
            with self.profile.step() if self.profile else nullcontext():
                row = self._step()
        except BaseException:  # Ctrl-C too
            self._order, shuffle, self.sampler.calls = before
            self._shuffle.set_state(shuffle)
            raise
        self.steps_done += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop stands: with it a new loop goes on as this one would."""
        return {
            "steps_done": self.steps_done,
            "order": list(self._order),
            "shuffle": self._shuffle.get_state(),
            "sampler_calls": self.sampler.calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.steps_done = state["steps_done"]
        self._order = list(state["order"])
        self._shuffle.set_state(state["shuffle"])
        self.sampler.calls = state["sampler_calls"]

    def _step(self) -> Row:
        trainer = self.trainer
        started = time.perf_counter()
        prompts = self._next_prompts()
        rate = self._set_learning_rate()
        rollout, (scores, means), sampled = self._rollout_and_scores(prompts)
        scored = time.perf_counter()
        stats = trainer.step(rollout, scores)
        ended = time.perf_counter()
        totals = scores if scores.ndim == 1 else scores.sum(1)
        # Of all processes, as are the figures of the trainer.
        gathered = trainer.accelerator.gather(totals.to(trainer.accelerator.device)).cpu()
        self.rollout, self.scores, self.all_scores = rollout, totals, gathered
        figures = {name: value for name, value in stats.items() if isinstance(value, float)}
        lengths = rollout.response_mask.sum(1).float()
        own = {f"reward/{name}": mean for name, mean in means.items()} | {
            "response/length": lengths.mean().item(),
            "response/ended": rollout.ended.float().mean().item(),
        }
        tokens = lengths.sum().item() * self.processes  # the others have about as many
        updates = stats["ppo/updates"] + stats["ppo/skipped_updates"]
        profile = self.profile
        return {
            "reward/mean": gathered.mean().item(),
            "reward/std": gathered.std(correction=0).item(),
            **(own if self.processes == 1 else mean_of_each(gather_object([own]))),
            **figures,
            "learning_rate": rate,
            "time/rollout": sampled - started,
            "time/evaluation": scored - sampled,
            "time/optimisation": ended - scored,
            "tokens_per_second": tokens / (ended - started),
            "tokens_per_second/rollout": tokens / (sampled - started),
            "tokens_per_second/optimisation": tokens / (ended - scored),
            **(profile.count(rollout, updates, ended - started) if profile else {}),
        }

    def _rollout_and_scores(self, prompts: list[Any]) -> tuple[Rollout, Judged, float]:
        """Return responses to the prompts, their scores, and when the last response was written."""
        trainer, around = self.trainer, self.trainer.clock.around
        if self.parts == 1:
            with around("generation"), trainer.sampling():
                rollout = self.sampler(trainer.model, prompts)
            sampled = time.perf_counter()
            with around("scorer"):
                return rollout, judge(self.scorer, rollout), sampled
        with Overlap(self.scorer) as overlap:
            with around("generation"), trainer.sampling():
                for part in self.sampler.in_parts(trainer.model, prompts, self.parts):
                    overlap.add(part)
            sampled = time.perf_counter()
            with around("scorer"):
                return *overlap.result(), sampled

    def _set_learning_rate(self) -> float:
        """Set the learning rate of this step, and return that of the first group of weights."""
        groups = self.trainer.optimizer.param_groups
        if self.schedule is not None:
            factor = self.schedule(self.steps_done)
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate * factor
        return float(groups[0]["lr"])

    def _next_prompts(self) -> list[Any]:
        """Return this process's share of the next batch."""
        while len(self._order) < self.prompts_per_step:
            again = torch.randperm(len(self.prompts), generator=self._shuffle)
            self._order = self._order + again.tolist()  # the old list may be needed again
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
    parts: int = 1,
    profile: str | os.PathLike[str] | None = None,
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
            training if it returns what counts as true.
        max_new_tokens: Most tokens of a response, or (shortest, longest) for a random limit.
        decay_learning_rate: Let the learning rate fall linearly to 0.
        parts: Write each batch in so many parts, and score one while the next is written: for a
            reward that waits for a server.
        profile: A folder for where the time goes: a table, and a trace of two steps.
        model_kwargs: Passed to `from_pretrained`: dtype, device_map, revision, ….
        sampler_kwargs: Passed to `Sampler`: group_size, stop_strings, add_bos, max_rows, ….
            Its tokenizer and max_new_tokens have parameters of their own here. `add_bos` is True
            here, as in recipes, for a tokenizer that has a BOS token.
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020.

    Returns:
        The tuned model and a row of figures for each step. The model's `save_pretrained` writes the
        tokenizer too.

    Raises:
        TypeError, ValueError: for settings or prompts that cannot work, before anything is
            trained.
        ScoringError: if the reward fails; the model is then as after the last whole step.

    Whatever ends the training early, Ctrl-C (KeyboardInterrupt) and what `on_step` raises included,
    carries what there is so far, a `Trained` like the one returned, as its attribute `trained`:

        try:
            model, history = trl.train(...)
        except KeyboardInterrupt as stopped:
            model, history = stopped.trained
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a whole number > 0, got {steps!r}.")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"`on_step` must be a function of (step, row) or None, got {on_step!r}.")
    _check_sampler_kwargs(sampler_kwargs)
    _check_names(ppo_params)
    if config is not None and ppo_params:
        raise TypeError(
            f"pass settings in `config` or as keyword arguments, not both; got "
            f"{sorted(ppo_params)} beside `config`: use dataclasses.replace(config, ...)."
        )
    config = config or PPOConfig.from_kwargs(**ppo_params)
    scorer = as_scorer(reward)
    prompts = checked_prompts(prompts)
    if peft_config is None and unfrozen_layers is None:
        _warn_of_frozen_weights(model)
    # An adapter's new weights are random.
    with seeded(config.seed), quiet_transformers():
        policy = load_policy(
            model, peft_config=peft_config, unfrozen_layers=unfrozen_layers, **model_kwargs or {}
        )
    trainer = PPOTrainer(policy, ref_model, config)
    found = _tokenizer(tokenizer, model, policy, prompts, model_kwargs or {})
    policy.tokenizer = found
    settings = {
        "temperature": config.temperature,
        "seed": config.seed,
        "add_bos": getattr(found, "bos_token_id", None) is not None,
    } | dict(sampler_kwargs or {})
    if isinstance(settings["seed"], int):  # every process draws from its own random numbers
        settings["seed"] = settings["seed"] * trainer.accelerator.num_processes
        settings["seed"] += trainer.accelerator.process_index
    sampler = Sampler(found, max_new_tokens=max_new_tokens, **settings)
    loop = Loop(
        trainer,
        sampler,
        scorer,
        prompts,
        schedule=partial(linear_decay, total_steps=steps) if decay_learning_rate else None,
        parts=parts,
        profile=profile,
    )
    history: list[Row] = []
    try:
        for step in range(1, steps + 1):
            row = {"step": float(step)} | loop.step()
            history.append(row)
            if on_step is not None and on_step(step, row):
                break
    except BaseException as error:  # Ctrl-C too: hours of training may lie behind
        error.trained = Trained(policy, history)
        raise
    return Trained(policy, history)


def mean_of_each(rows: Sequence[Row]) -> Row:
    """Return the mean of each figure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def checked_prompts(prompts: Any) -> list[Any]:
    """Return the prompts as a list of at least one.

    Raises:
        TypeError: if they are one prompt, or nothing of the kind.
        ValueError: if there are none.
    """
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
        prompts = list(prompts)
    prompts = listed(prompts, "prompts")
    if not prompts:
        raise ValueError("`prompts` must have at least one entry, got none.")
    return prompts


def check_parts(parts: Any, prompts: int) -> None:
    """Raise a ValueError unless so many prompts can be written in so many parts."""
    if isinstance(parts, bool) or not isinstance(parts, int) or not 1 <= parts <= prompts:
        raise ValueError(
            f"`parts` must be a whole number from 1 to {prompts}, the prompts of a step on one "
            f"process (batch_size / group_size / processes), got {parts!r}."
        )


def _check_names(ppo_params: dict[str, Any]) -> None:
    """Raise a TypeError for what is neither a parameter of `train` nor a field of `PPOConfig`."""
    fields = PPOConfig.known_names()
    known = [name for name in inspect.signature(train).parameters if name != "ppo_params"] + fields
    of_sampler = inspect.signature(Sampler).parameters
    problems = []
    for name in [name for name in ppo_params if name not in fields]:
        ending = (other for other in known if name.endswith(f"_{other}"))  # num_steps
        hint = closest(next(ending, name), known)
        if name in of_sampler:
            hint = f" Pass it as sampler_kwargs={{{name!r}: ...}}."
        problems.append(f"train has no parameter `{name}`.{hint}")
    if problems:
        raise TypeError(" ".join(problems))


def _check_sampler_kwargs(settings: Any) -> None:
    """Raise a TypeError for what is no setting of `Sampler`, or a parameter of `train`."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise TypeError(f"`sampler_kwargs` must be a dict or None, got {settings!r}.")
    known = list(inspect.signature(Sampler).parameters)
    for name in settings:
        if name in ("tokenizer", "max_new_tokens"):
            raise TypeError(
                f"`sampler_kwargs` must not have `{name}`: pass it as train({name}=...)."
            )
        if name not in known:
            raise TypeError(f"Sampler has no setting `{name}`.{closest(str(name), known)}")


def _warn_of_frozen_weights(model: Any) -> None:
    """Warn if a loaded model has weights that are not trained, and nothing says why."""
    explained = hasattr(model, "v_head") or hasattr(model, "get_base_model")
    if not isinstance(model, nn.Module) or explained:
        return
    # Positions that are computed once, not learned, are never trained.
    constant = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and "Sinusoidal" in type(module).__name__
    }
    weights = [weight for weight in model.parameters() if id(weight) not in constant]
    frozen = sum(not weight.requires_grad for weight in weights)
    if frozen:
        warnings.warn(
            f"`model` must require gradients for what is to be trained, but {frozen} of its "
            f"{len(weights)} weights do not and stay as they are, perhaps since an earlier run: "
            "call model.requires_grad_(True) to train all, or pass unfrozen_layers or peft_config.",
            stacklevel=3,
        )


def _tokenizer(
    given: PreTrainedTokenizerBase | str | None,
    model: Any,
    policy: nn.Module,
    prompts: list[Any],
    model_kwargs: dict[str, Any],
) -> PreTrainedTokenizerBase | None:
    """Return the policy's tokenizer: the one given, or the one beside the model or its base."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    places = _tokenizer_places(given, model, policy, model_kwargs)
    for name, where in places:
        try:
            return AutoTokenizer.from_pretrained(name, **where)
        except (OSError, ValueError) as error:
            problem = error
    if given is None and isinstance(prompts[0], Tensor):
        return None  # nothing asks for one, unless the reward reads text, and then says so
    names = " or ".join(repr(name) for name, _ in places)
    raise ValueError(
        f"`tokenizer` must be given: there is none beside the model ({names})."
    ) from problem


def _tokenizer_places(
    given: str | None, model: Any, policy: nn.Module, model_kwargs: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Return where a tokenizer may be, best first, with the arguments that lead there."""
    where = hub_arguments(model_kwargs)
    trust = {k: model_kwargs[k] for k in ("trust_remote_code",) if k in model_kwargs}
    # Which revision and which folder are said of the model alone.
    anywhere = trust | {k: v for k, v in where.items() if k not in ("revision", "subfolder")}
    if given is not None:
        return [(os.fspath(given), anywhere)]
    # An adapter's folder may have none; the model that it was put on comes from another place.
    loaded_from = (language_model(policy).config.name_or_path, anywhere)
    if not isinstance(model, (str, os.PathLike)):
        return [loaded_from]
    beside = (os.path.expanduser(os.fspath(model)), where | trust)
    return [beside] if beside[0] == loaded_from[0] else [beside, loaded_from]
