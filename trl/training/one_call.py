"""`train`: a model, prompts and a reward, and all the rest in one call.

model, history = trl.train(
    model="gpt2", prompts=["This film was"], reward=lambda texts: [float(len(t)) for t in texts]
)
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl.anatomy import language_model
from trl.compute.precision import make_accelerator
from trl.config import PPOConfig, closest
from trl.config.errors import refuse
from trl.config.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    SamplingConfig,
    ScheduleConfig,
)
from trl.data.prompts import PromptSplit
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer
from trl.models.checkpoint import hub_arguments
from trl.models.loading import quiet_transformers
from trl.models.reference import ReferenceKind
from trl.models.with_value_head import load_policy
from trl.optimization.schedule import schedule_factor
from trl.ppo import PPOTrainer
from trl.rollout.queries import Chat
from trl.rollout.sampler import Sampler
from trl.training.folder import RunFolder
from trl.training.loop import Row, checked_prompts
from trl.training.parts import Parts, seeded
from trl.training.resume import check_same, opened
from trl.training.run import Run
from trl.watch.diagnosis import Finding

Prompts = Sequence[str] | Sequence[Chat] | Sequence[Tensor]


class Trained(NamedTuple):
    """What `train` returns."""

    model: nn.Module
    """The tuned policy; `.save_pretrained` writes a folder that plain transformers loads, with the
    tokenizer of the training."""
    history: list[Row]
    """A row of figures for each step; with `held_out`, one of step 0 comes first."""


def train(
    model: str | os.PathLike[str] | nn.Module,
    prompts: Prompts,
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
    held_out: Prompts | None = None,
    eval_every: int = 25,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    resume: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    sampler_kwargs: dict[str, Any] | None = None,
    **ppo_params: Any,
) -> Trained:
    """Tune a language model by PPO: sample responses to the prompts, score them, learn, repeat.

    What looks wrong is said in words, as a warning: see `trl.watch.diagnosis`.

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
        held_out: Prompts that are not trained on, to measure on: figures `held_out/…` of a row.
        eval_every: Measure on them every so many steps, at the start and at the end.
        out: A folder for the run, as `trl train` writes it and `trl report` reads it: figures,
            samples, warnings, checkpoints, the best and the last policy, a report. The random
            numbers of Python, NumPy and torch are seeded then. None: nothing is written.
        checkpoint_every: Write what the run can go on from every so many steps, and at the end.
        resume: None: a new run. "auto": go on from the last checkpoint in `out`, or start if there
            is none. A checkpoint's folder: go on from that one. The arguments must be as before,
            a loaded model as it was before the first step.
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
        FileExistsError: if there is a run in `out`, and `resume` is None.
        CheckpointError: if no checkpoint is whole, or it is that of another run.
        ScoringError: if the reward fails; the model is then as after the last whole step.

    Whatever ends the training early, Ctrl-C (KeyboardInterrupt) and what `on_step` raises included,
    carries what there is so far, a `Trained` like the one returned, as its attribute `trained`:

        try:
            model, history = trl.train(...)
        except KeyboardInterrupt as stopped:
            model, history = stopped.trained

    With `out`, the step that is under way at Ctrl-C is finished, and a checkpoint written, first.
    """
    _check_arguments(on_step, config, ppo_params, sampler_kwargs, out, resume)
    config = config or PPOConfig.from_kwargs(**ppo_params)
    scorer = as_scorer(reward)
    measured = [] if held_out is None else checked_prompts(held_out, "held_out")
    split = PromptSplit(checked_prompts(prompts), measured)
    if peft_config is None and unfrozen_layers is None:
        _warn_of_frozen_weights(model)
    every = CheckpointConfig(every=checkpoint_every)
    recipe = Recipe(steps=steps, eval_every=eval_every, checkpoints=every, quiet=True)
    changes = {"peft_config": peft_config, "unfrozen_layers": unfrozen_layers}
    schedule = partial(schedule_factor, total_steps=steps) if decay_learning_rate else None
    of_loop = {"schedule": schedule, "parts": parts, "profile": profile}
    history: list[Row] = []

    def on_row(row: Row) -> Any:
        if row["step"] > 0 or measured:
            history.append(_figures(row))
        return row["step"] > 0 and on_step and on_step(int(row["step"]), history[-1])

    accelerator = make_accelerator(config.precision)
    folder = None if out is None else RunFolder(Path(out).expanduser())
    nowhere = nullcontext((None, []))
    with opened(folder, resume, accelerator) if folder else nowhere as (checkpoint, _):
        with seeded(config.seed), quiet_transformers():  # an adapter's new weights are random
            policy = load_policy(model, **changes, **model_kwargs or {})
        trainer = PPOTrainer(policy, ref_model, config, accelerator=accelerator)
        policy.tokenizer = _tokenizer(tokenizer, model, policy, split, model_kwargs or {})
        sampling = _sampling(config, policy.tokenizer, max_new_tokens, sampler_kwargs)
        made = Parts(trainer, policy.tokenizer, split, scorer=scorer, **sampling, **of_loop)
        if folder is not None:
            recipe = _described(recipe, made, folder, model, sampling["sampling"])
        run = Run(recipe, made, folder, on_row=on_row, on_finding=_warn_of)
        return _trained(run, checkpoint, history)


def _trained(run: Run, checkpoint: Path | None, history: list[Row]) -> Trained:
    """Make the steps that are left."""
    trained = Trained(run.parts.model, history)
    if checkpoint is not None:
        check_same(run.folder, run.recipe)
        run.go_on_from(checkpoint)
        rows = run.folder.rows("metrics")
        history += [_figures(row) for row in rows if row["step"] > 0 or run.parts.held_out]
    try:
        if run.train().interrupted:
            raise KeyboardInterrupt
    except BaseException as error:  # Ctrl-C too: hours of training may lie behind
        error.trained = trained
        raise
    return trained


def _figures(row: Mapping[str, Any]) -> Row:
    """Return a row of the history; what metrics.jsonl has no number for is NaN."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in row.items()
        if name != "episodes"
    }


def _warn_of(finding: Finding) -> None:
    warnings.warn(f"trl.train, step {finding.step}: {finding}", stacklevel=7)


def _sampling(
    config: PPOConfig, tokenizer: Any, max_new_tokens: Any, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return settings of `Sampler`, and the seed that its random numbers start from."""
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": config.temperature,
        "add_bos": getattr(tokenizer, "bos_token_id", None) is not None,
    } | dict(given or {})
    return {"seed": settings.pop("seed", config.seed), "sampling": settings}


def _described(
    recipe: Recipe, parts: Parts, folder: RunFolder, model: Any, sampling: Mapping[str, Any]
) -> Recipe:
    """Return the recipe with what can be said of objects, for `trl report` and `trl compare`."""
    config, loop, policy = parts.trainer.config, parts.loop, parts.model
    limit = sampling["max_new_tokens"]
    shortest, longest = limit if isinstance(limit, tuple) else (None, limit)
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
    else:
        inner = language_model(policy)
        name = inner.config.name_or_path or type(inner).__name__
    return replace(
        recipe,
        model=ModelConfig(
            name=name,
            unfrozen_layers=getattr(policy, "unfrozen_layers", None),
            reference=None if parts.trainer.reference else "none",
        ),
        data=DataConfig(
            prompts=f"{len(parts.prompts.train)} prompts given in Python",
            held_out=len(parts.prompts.held_out),
        ),
        sampling=SamplingConfig(
            max_new_tokens=longest,
            shortest_limit=shortest,
            group_size=loop.sampler.group_size,
            eos=sampling.get("eos_token_id", "") is not None,
            stop_strings=tuple(sampling.get("stop_strings", ())),
            add_bos=loop.sampler.add_bos,
            max_rows=loop.sampler.max_rows,
            parts=loop.parts,
        ),
        reward=tuple(
            RewardConfig(kind="function", name=_place_of(scorer), title=name, weight=weight)
            for name, (scorer, weight) in parts.judge.parts.items()
        ),
        ppo=config,
        schedule=ScheduleConfig(kind="linear" if loop.schedule else "constant"),
        seed=config.seed,
        out=str(folder.path),
        profile=loop.profile and str(loop.profile.folder),
    )


def _place_of(scorer: Any) -> str:
    """Return module and name of a scorer's function, or of its class."""
    function = getattr(scorer, "function", scorer)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


# -- what is refused, or warned of, before anything is loaded --------------------------------------


def _check_arguments(
    on_step: Any,
    config: PPOConfig | None,
    ppo_params: Mapping[str, Any],
    sampler_kwargs: Any,
    out: Any,
    resume: Any,
) -> None:
    """Raise a TypeError or ValueError for arguments that no training can have."""
    if on_step is not None and not callable(on_step):
        refuse("on_step", "be a function of (step, row) or None", repr(on_step), error=TypeError)
    if resume is not None and out is None:
        refuse("resume", "be None without `out`", repr(resume), "pass the folder of the run")
    fields, of_sampler = PPOConfig.known_names(), inspect.signature(Sampler).parameters
    known = [name for name in inspect.signature(train).parameters if name != "ppo_params"] + fields
    # What is neither a parameter of `train` nor a field of `PPOConfig`.
    unknown = [name for name in ppo_params if name not in fields]
    if unknown:
        instead = {name: f" Pass it as sampler_kwargs={{{name!r}: ...}}." for name in of_sampler}
        hints = {k: instead.get(k) or closest(k.removeprefix("num_"), known) for k in unknown}
        raise TypeError(" ".join(f"train has no parameter `{k}`.{v}" for k, v in hints.items()))
    if config is not None and ppo_params:
        raise TypeError(
            f"pass settings in `config` or as keyword arguments, not both; got "
            f"{sorted(ppo_params)} beside `config`: use dataclasses.replace(config, ...)."
        )
    if not isinstance(sampler_kwargs, Mapping | None):
        refuse("sampler_kwargs", "be a dict or None", repr(sampler_kwargs), error=TypeError)
    for name in sampler_kwargs or ():
        if name in ("tokenizer", "max_new_tokens"):
            fix = f"pass it as train({name}=...)"
            refuse("sampler_kwargs", f"not have `{name}`", fix=fix, error=TypeError)
        if name not in of_sampler:
            raise TypeError(f"Sampler has no setting `{name}`.{closest(str(name), of_sampler)}")


def _warn_of_frozen_weights(model: Any) -> None:
    """Warn if a loaded model has weights that are not trained, and nothing says why."""
    explained = hasattr(model, "v_head") or hasattr(model, "get_base_model")
    if not isinstance(model, nn.Module) or explained:
        return
    # Embeddings of positions are left out: some are computed once, and never trained.
    weights = [weight for name, weight in model.named_parameters() if "position" not in name]
    frozen = sum(not weight.requires_grad for weight in weights)
    if frozen:
        warnings.warn(
            f"`model` must require gradients for what is to be trained, but {frozen} of its "
            f"{len(weights)} weights do not and stay as they are, perhaps since an earlier run: "
            "call model.requires_grad_(True) to train all, or pass unfrozen_layers or peft_config.",
            stacklevel=3,
        )


# -- the tokenizer -------------------------------------------------------------------------------


def _tokenizer(
    given: PreTrainedTokenizerBase | str | None,
    model: Any,
    policy: nn.Module,
    prompts: PromptSplit,
    model_kwargs: dict[str, Any],
) -> PreTrainedTokenizerBase | None:
    """Return the policy's tokenizer: the one given, or the one beside the model or its base."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    where = hub_arguments(model_kwargs)
    where |= {key: model_kwargs[key] for key in ("trust_remote_code",) if key in model_kwargs}
    # An adapter's folder may have none; the model that it was put on comes from another place.
    names, beside = [language_model(policy).config.name_or_path], None
    if given is not None:
        names = [os.fspath(given)]
    elif isinstance(model, (str, os.PathLike)):
        beside = os.path.expanduser(os.fspath(model))
        names = list(dict.fromkeys([beside, *names]))
    for name in names:
        if name != beside:  # which revision and which folder are said of the model alone
            where = {k: v for k, v in where.items() if k not in ("revision", "subfolder")}
        try:
            return AutoTokenizer.from_pretrained(name, **where)
        except (OSError, ValueError) as error:
            problem = error
    if given is None and isinstance(prompts.train[0], Tensor) and not prompts.held_out:
        return None  # nothing asks for one, unless the reward reads text, and then says so
    places = " or ".join(map(repr, names))
    raise ValueError(
        f"`tokenizer` must be given: there is none beside the model ({places})."
    ) from problem
