"""`train`: a model, prompts and a reward, and all the rest in one call.

model, history = trl.train(
    model="gpt2", prompts=["This film was"], reward=lambda texts: [float(len(t)) for t in texts]
)
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl.anatomy import language_model
from trl.compute.precision import make_accelerator
from trl.config import PPOConfig, check_values, closest, moved
from trl.config import recipe as settings
from trl.config.algorithms import FACTS
from trl.config.errors import refuse, shown
from trl.config.ppo import group_size
from trl.config.types import Count, Whole
from trl.data.prompts import PromptSplit
from trl.data.stream import BUFFER, FIRST, PromptStream
from trl.environments import EnvironmentReward, Episodes, World, episodes_of
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer, words_of
from trl.evaluation.weighted_sum import Part, WeightedSum, check_columns
from trl.models.reference import ReferenceKind
from trl.models.value_head import ValueHeadKind
from trl.optimization.settings import resolve_config
from trl.rollout.queries import SENT_AS_CHATS, Chat, ChatForm, prompts_apart
from trl.rollout.sampler import Sampler
from trl.training.checkpoints import step_of
from trl.training.described import environment_config, lora_config, reward_config, values_config
from trl.training.folder import RunFolder
from trl.training.held_out import Sample
from trl.training.loop import Row, checked_prompts
from trl.training.parts import Parts
from trl.training.resume import opened
from trl.training.run import Run
from trl.watch.diagnosis import Finding
from trl.watch.display import Display

Prompts = Sequence[str] | Sequence[Chat] | Sequence[Tensor] | Iterable[Any] | Callable[[], Any]


class _Pair(NamedTuple):
    model: nn.Module
    """The tuned policy; `.save_pretrained` writes a folder that plain transformers loads, with the
    tokenizer of the training."""
    history: list[Row]
    """A row of figures for each step; with `held_out`, one of step 0 comes first."""


class Trained(_Pair):
    """What `train` returns: `model, history = trl.train(...)`, and more under its names."""

    samples: Sequence[Sample] = ()
    """Responses at the last evaluation on held-out prompts, or of the last batch if there are none:
    dicts with `prompt`, `response`, `reward`, …, see `trl.training.held_out.Sample`."""
    report: Path | None = None
    """With `out`: the page on the run, and all that it was made of beside it."""

    def __repr__(self) -> str:
        """Show what a cell of a notebook has room for."""
        shown = f"{type(self.model).__name__}, {len(self.history)} rows of figures"
        shown += f", {len(self.samples)} samples"
        return f"Trained({shown}{f', {self.report}' if self.report else ''})"


def train(
    model: str | os.PathLike[str] | nn.Module,
    prompts: Prompts | int | None = None,
    reward: Part | list[Part | tuple[Part, float]] | dict[Part, float] | None = None,
    *,
    environment: Any = None,
    tools: Sequence[Callable[..., Any]] = (),
    environment_kwargs: dict[str, Any] | None = None,
    steps: int = 100,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    config: PPOConfig | None = None,
    ref_model: nn.Module | ReferenceKind | None = None,
    peft_config: Any = None,
    unfrozen_layers: int | None = None,
    critic: str | os.PathLike[str] | nn.Module = "same",
    value_head: ValueHeadKind | None = None,
    shard: bool = False,
    offload: bool = False,
    on_step: Callable[[int, Row], Any] | None = None,
    max_new_tokens: int | tuple[int, int] = 24,
    chat: bool | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    decay_learning_rate: bool = True,
    parts: int = 1,
    shuffle_buffer: int = BUFFER,
    held_out: Prompts | int | None = None,
    eval_every: int = 25,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    keep_optimizer: bool = False,
    resume: str | os.PathLike[str] | None = None,
    quiet: bool | None = None,
    profile: str | os.PathLike[str] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    sampler_kwargs: dict[str, Any] | None = None,
    **ppo_params: Any,
) -> Trained:
    """Tune a language model by PPO: sample responses to the prompts, score them, learn, repeat.

    What looks wrong is said in words, as a warning: see `trl.watch.diagnosis`.

    Args:
        model: Hub name or folder of any causal or encoder-decoder model, or a loaded one.
        prompts: Texts, chats (lists of messages), or tensors of token ids. What need not fit into
            memory, or has no end, is read as it is used: a `datasets.IterableDataset`; a
            `pathlib.Path`, or several, of files (with * for many); or a function that returns an
            iterable, a new one at each call. An iterator, which can be read but once, can have no
            `out`. Texts are sent as chats if the model has a chat template: see `chat`. With an
            environment that makes up its own tasks, a number of them will do; None: 256.
        reward: A function from the B texts (query and response) to B numbers, or of what else its
            parameters name (see `FunctionScorer`); any scorer of `trl.evaluation`; or several of
            them, as a list, a list of (scorer, weight), or a dict {scorer: weight}. What an
            environment gives is added, unless `EnvironmentReward()` is one of them, with a weight
            of its own. None: that alone.
        environment: The responses are conversations with it: a class of tools, or of a game; or a
            dict of several. See `trl.environments.Episodes`, and `Turn`.
        tools: Functions that the policy may call on the way, alone or beside an environment.
        environment_kwargs: Passed to `Episodes`: max_turns, max_tokens, call_format, ….
        steps: PPO steps, each on `batch_size` responses.
        tokenizer: The policy's. None: the one beside the model.
        config: Settings of PPO, taken whole. None: what learns on most models (docs/defaults.md:
            a learning rate that sets itself, 32 responses a step), changed by `ppo_params`.
        ref_model: See `PPOTrainer`.
        peft_config: Train an adapter (`peft.LoraConfig` and others) rather than the model.
        unfrozen_layers: Train the top k layers only.
        critic: What gives the values: "same", the policy's own hidden states; "copy", a copy of the
            policy; or another model, such as a reward model: see
            `CausalLMWithValueHead.from_pretrained`.
        value_head: linear, mlp or bins; see there, also for model_kwargs={"value_range": …}.
        shard: Let each process hold its part of the weights alone: see `PPOTrainer`.
        offload: Hold these parts in the CPU's memory: likewise.
        on_step: Called as on_step(step, row) after each step, step counting from 1; stops the
            training if it returns what counts as true.
        max_new_tokens: Most tokens of a response, or (shortest, longest) for a random limit.
        chat: Send each text, held-out ones too, as the user's message of a chat, rather than as
            it is. None: if the tokenizer has a chat template, and the texts have not been through
            it already; a line on the standard error then says so. Prompts that are chats, or token
            ids, are sent as they are in any case.
        system: The system message of each chat that has none of its own.
        chat_template_kwargs: What the chat template is told besides the messages, as
            {"enable_thinking": False}.
        decay_learning_rate: Let the learning rate fall linearly to 0; of "auto", the way that the
            policy goes in a step.
        parts: Write each batch in so many parts, and score one while the next is written: for a
            reward that waits for a server.
        shuffle_buffer: Of what is read as it is used, draw each prompt from the next so many.
        held_out: Prompts that are not trained on, to measure on: figures `held_out/…` of a row. A
            number: the first so many of `prompts`.
        eval_every: Measure on them every so many steps, at the start and at the end.
        out: A folder for the run, as `trl train` writes it and `trl report` reads it: figures,
            samples, warnings, checkpoints, the best and the last policy, a report. The random
            numbers of Python, NumPy and torch are seeded then. None: nothing is written.
        checkpoint_every: Write what the run can go on from every so many steps, and at the end.
        keep_optimizer: Keep, when the last step is made, all that it takes to make more steps:
            False leaves out the optimiser's state, two thirds of a checkpoint.
        resume: None: a new run. "auto": go on from the last checkpoint in `out`, or start if there
            is none. A checkpoint's folder: go on from that one. The arguments must be as before,
            a loaded model as it was before the first step: what differs is refused by name, and
            gone on with all the same by "changed" or "changed:" and a checkpoint's folder.
        quiet: Show no progress. None: none in a notebook, or where `on_step` may show it. It is a
            bar in a terminal, a line now and then in a log; False: a bar in a notebook, too.
        profile: A folder for where the time goes: a table, and a trace of two steps.
        model_kwargs: Passed to `from_pretrained`: dtype, device_map, revision, gguf_file, ….
        sampler_kwargs: Passed to `Sampler`: group_size, stop_strings, add_bos, max_rows, ….
            Its tokenizer and max_new_tokens have parameters of their own here. `add_bos` is True
            here, as in recipes, for a tokenizer that has a BOS token.
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020.

    Returns:
        The tuned model and a row of figures for each step, with the last `samples`, and the path of
        the `report`, as attributes. The model's `save_pretrained` writes the tokenizer too.

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
    _check_arguments(on_step, ppo_params, sampler_kwargs, out, resume)
    config = _configured(config, ppo_params, ref_model, critic)
    scorer, prompts, episodes = _task(reward, prompts, environment, tools, environment_kwargs)
    split = _split(prompts, held_out, shuffle_buffer, saved=out is not None)
    _look_before_loading(scorer, split, model, peft_config, unfrozen_layers)
    often = {"steps": steps, "eval_every": eval_every, "seed": config.seed}
    recipe = _plan(often, decay_learning_rate, checkpoint_every, keep_optimizer)
    chats = {"chat": chat, "system": system, "chat_template_kwargs": chat_template_kwargs}
    sampling = {"max_new_tokens": max_new_tokens, "group_size": group_size(config.algorithm)}
    sampling |= {"chat_template_kwargs": chat_template_kwargs} | (sampler_kwargs or {})
    loading = {"critic": critic, "value_head": value_head, "peft_config": peft_config}
    loading |= {"unfrozen_layers": unfrozen_layers} | (model_kwargs or {})
    given = {"scorer": scorer, "sampling": sampling, "model_kwargs": loading, "parts": parts}
    given |= {"ref_model": ref_model, "tokenizer": tokenizer, "profile": profile, "shard": shard}
    given |= {"only_tokens": _only_tokens(split), "episodes": episodes, "offload": offload}
    accelerator = make_accelerator(config.precision, config.collective_timeout)
    folder = None if out is None else RunFolder(Path(out).expanduser())
    with opened(folder, resume, accelerator) as (checkpoint, _):
        sent = partial(_sent, split, chats, tells=accelerator.is_main_process)
        made = Parts(model, config, accelerator, recipe, prompts=sent, **given)
        recipe = _described(recipe, config, made, folder, model, sampling, loading)
        return _trained(Run(recipe, made, folder, on_finding=_warn_of), checkpoint, on_step, quiet)


def _task(
    reward: Any,
    prompts: Any,
    environment: Any,
    tools: Sequence[Any],
    more: Mapping[str, Any] | None,
) -> tuple[Scorer, Any, partial[Episodes] | None]:
    """Return the scorer, the prompts, and what makes episodes of them, if there is an environment.

    One that makes up its own tasks needs no prompts, or a number of them.
    """
    episodes, world = _episodes(environment, tools, more)
    scorer = _scorer(reward, gives=world is not None and world.gives_rewards)
    if world is not None and isinstance(prompts, int | None):
        prompts = [""] * (256 if prompts is None else prompts)
    return scorer, prompts, episodes


def _episodes(
    environment: Any, tools: Sequence[Any], more: Mapping[str, Any] | None
) -> tuple[partial[Episodes] | None, World | None]:
    """Return what makes a sampler one of episodes, and their environments; None: there are none."""
    if environment is not None or tools:
        episodes = episodes_of(environment, tools, **(more or {}))
        return episodes, episodes.keywords["environment"]
    if more:
        rule = "be None without `environment` and `tools`"
        refuse("environment_kwargs", rule, shown(dict(more)), error=TypeError)
    return None, None


def _scorer(reward: Any, *, gives: bool) -> Scorer:
    """Return the reward as one scorer, with what an environment gives."""
    if reward is None:
        if not gives:
            fix = "pass a function of texts that returns numbers, or an environment that gives some"
            refuse("reward", "be given", "None", fix, error=TypeError)
        return EnvironmentReward()
    several = isinstance(reward, list | dict)
    if gives and not any(isinstance(each, EnvironmentReward) for each in _scorers_in(reward)):
        pairs = list(reward.items()) if isinstance(reward, dict) else reward
        return WeightedSum([*(pairs if several else [pairs]), EnvironmentReward()])
    return WeightedSum(reward) if several else as_scorer(reward)


def _scorers_in(reward: Any) -> list[Any]:
    entries = list(reward) if isinstance(reward, list | dict) else [reward]
    return [entry[0] if isinstance(entry, tuple) else entry for entry in entries]


def _configured(
    config: PPOConfig | None, given: Mapping[str, Any], ref_model: Any, critic: Any
) -> PPOConfig:
    """Return the settings of PPO: those given, and what learns in place of the others."""
    learns = partial(PPOConfig.that_learns, reference=ref_model != "none")
    config = resolve_config(config, given, learns)
    if critic != "same" and not FACTS[config.algorithm].critic:
        rule = f"be 'same' with algorithm={config.algorithm!r}, which trains no values"
        refuse("critic", rule, shown(critic))
    return config


def _plan(
    often: Mapping[str, int], decays: bool, checkpoint_every: int, keep_optimizer: bool
) -> settings.Recipe:
    """Return a recipe of the steps, of how the learning rate goes, and of the checkpoints."""
    return settings.Recipe(
        **often,
        schedule=settings.ScheduleConfig(kind="linear" if decays else "constant"),
        checkpoints=settings.CheckpointConfig(
            every=checkpoint_every, keep_optimizer=keep_optimizer
        ),
    )


def _only_tokens(split: PromptSplit) -> bool:
    """Tell whether no prompt needs a tokenizer, nor a sample of those that are held out."""
    return isinstance(prompts_apart(split.train[:1])[0][0], Tensor) and not split.held_out


def _split(prompts: Any, held_out: Any, buffer: int, *, saved: bool) -> PromptSplit:
    """Return the prompts to train and to measure on; `saved`: checkpoints are to be written."""
    number = held_out if isinstance(held_out, int) else 0
    check_values("train", {"shuffle_buffer": (Count, buffer), "held_out": (Whole, number)})
    if saved and isinstance(prompts, Iterator):  # refused, however few they are
        PromptStream(iter, once=True).to_be_saved()
    found, measured = checked_prompts(prompts, buffer=buffer, held_out=number), []
    if not isinstance(held_out, int | None):
        measured = checked_prompts(held_out, "held_out")
        if isinstance(measured, PromptStream):
            rule = "be a list of prompts, or a number of those in `prompts`"
            refuse("held_out", rule, type(held_out).__name__, error=TypeError)
    if isinstance(found, PromptStream):
        found.to_be_saved() if saved else found.look()
        measured = measured or found.held_out
        return PromptSplit(found.first, measured, {}, found, measured)
    if number >= len(found):
        refuse("held_out", f"be less than the {len(found)} prompts", number)
    split = PromptSplit(found[number:], measured or found[:number])
    _tell_what_is_in_both(split)
    return split


def _tell_what_is_in_both(split: PromptSplit) -> None:
    """Say how many held-out prompts are trained on too: they are no measure of new ones."""
    if len(split.held_out) and not _is_tokens(split.train):
        known = set(map(repr, split.train))  # with their columns: a task may be in these
        asked = [row for row in split.held_out if any(prompts_apart([row])[0])]
        both = sum(repr(row) in known for row in asked)
        if both:
            told = f"{both} of the {len(split.held_out)} held-out prompts are trained on too"
            print(f"trl.train: {told}: leave these out, to measure on new ones.", file=sys.stderr)


def _is_tokens(prompts: Any) -> bool:
    return isinstance(prompts_apart(prompts[:1])[0][0], Tensor)


def _sent(
    split: PromptSplit,
    chats: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    policy: nn.Module | None = None,
    *,
    tells: bool,
) -> PromptSplit:
    """Return the prompts as they are sent, texts as chats if need be, and tell that once."""
    form = ChatForm(tokenizer, split.train[:FIRST], **chats)
    if form.decided and tells:
        print("trl.train:", SENT_AS_CHATS.format("chat=False"), file=sys.stderr)
    train, held_out = list(map(form, split.train)), list(map(form, split.held_out))
    stream = split.train_rows if isinstance(split.train_rows, PromptStream) else None
    if stream is not None:
        stream.form = form
    return PromptSplit(train, held_out, {}, stream or (), held_out)


def _trained(
    run: Run,
    checkpoint: Path | None,
    on_step: Callable[[int, Row], Any] | None,
    quiet: bool | None,
) -> Trained:
    """Make the steps that are left, and show how they go."""
    if quiet is None and on_step is not None:
        quiet = True
    trained, steps = Trained(run.parts.model, run.history), run.recipe.total_steps
    before = (checkpoint and step_of(checkpoint)) or 0
    quiet = quiet if run.accelerator.is_main_process else True
    try:
        with Display(steps, first_step=before, quiet=quiet) as display:
            run.by_call, run.on_step = True, partial(_seen, display, on_step)
            if run.train(checkpoint).interrupted:
                where = f"after step {run.loop.steps_done}, saved in {run.path}"
                how = 'resume="auto" goes on with it (a model that was passed: loaded anew)'
                raise KeyboardInterrupt(f"{where}: {how}")
            trained.report = run.folder and run.folder.report
    except BaseException as error:  # Ctrl-C too: hours of training may lie behind
        error.trained = trained
        raise
    finally:
        trained.samples = run.samples()
    return trained


def _seen(display: Display, on_step: Callable[[int, Row], Any] | None, step: int, row: Row) -> Any:
    display.row({"step": step} | row)
    return on_step(step, row) if on_step is not None else None


def _warn_of(finding: Finding) -> None:
    told = str(finding).replace("`ppo.", "`")  # which are parameters here
    warnings.warn(f"trl.train, step {finding.step}: {told}", stacklevel=8)


def _described(
    recipe: settings.Recipe,
    config: PPOConfig,
    parts: Parts,
    folder: RunFolder | None,
    model: Any,
    given: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> settings.Recipe:
    """Return the recipe with what can be said of objects, for `trl report` and `trl compare`."""
    if folder is None:  # nobody reads it
        return recipe
    loop, policy = parts.loop, parts.model
    limits, sent = given["max_new_tokens"], prompts_apart(parts.prompts.train)[0]
    limits = limits if isinstance(limits, tuple) else (None, limits)
    if not isinstance(model, (str, os.PathLike)):
        inner = language_model(policy)
        model = inner.config.name_or_path or type(inner).__name__
    frozen, reference = getattr(policy, "unfrozen_layers", None), parts.trainer.reference
    return replace(
        recipe,
        model=settings.ModelConfig(
            name=os.fspath(model),
            gguf_file=loading.get("gguf_file"),
            unfrozen_layers=frozen,
            lora=lora_config(policy),
            shard=parts.sharded,
            offload=parts.sharded and parts.trainer.updater.offload,
            reference=None if reference else "none",
            **values_config(policy, loading["critic"]),
        ),
        data=settings.DataConfig(
            prompts=f"{len(parts.prompts.train)} prompts given in Python"
            if loop.stream is None
            else "a stream given in Python",
            shuffle_buffer=loop.stream and loop.stream.buffer_size,
            held_out=len(parts.prompts.held_out),
            held_out_prompts="given in Python" if parts.prompts.held_out else None,
            shuffle=loop.stream is not None,
            chat=None if isinstance(sent[0], Tensor) else not isinstance(sent[0], str),
            system=_system_of(sent),
            chat_template_kwargs=given.get("chat_template_kwargs"),
        ),
        sampling=settings.SamplingConfig(
            shortest_limit=limits[0],
            max_new_tokens=limits[1],
            eos=given.get("eos_token_id", "") is not None,
            stop_strings=tuple(given.get("stop_strings", ())),
            parts=loop.parts,
            **{k: getattr(loop.sampler, k) for k in ("group_size", "add_bos", "max_rows")},
        ),
        environment=environment_config(loop.sampler),
        ppo=config,
        reward=tuple(
            reward_config(scorer, name, weight)
            for name, (scorer, weight) in parts.judge.parts.items()
        ),
        quiet=True,
        out=str(folder.path),
        profile=loop.profile and str(loop.profile.folder),
    )


def _system_of(prompts: Sequence[Any]) -> str | None:
    """Return the system message that all prompts share; None: they have none, or several."""
    if isinstance(prompts[0], str | Tensor):
        return None
    found = {words_of(chat[0]) if chat[0]["role"] == "system" else "" for chat in prompts}
    return (found.pop() or None) if len(found) == 1 else None


# -- what is refused, or warned of, before anything is loaded --------------------------------------


def _check_arguments(
    on_step: Any, ppo_params: Mapping[str, Any], sampler_kwargs: Any, out: Any, resume: Any
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
        instead |= {name: f" Pass {here}." for name, here in moved.OF_TRAIN.items()}
        hints = {k: instead.get(k) or closest(k.removeprefix("num_"), known) for k in unknown}
        raise TypeError(" ".join(f"train has no parameter `{k}`.{v}" for k, v in hints.items()))
    if not isinstance(sampler_kwargs, Mapping | None):
        refuse("sampler_kwargs", "be a dict or None", repr(sampler_kwargs), error=TypeError)
    for name in {"tokenizer", "max_new_tokens", "chat_template_kwargs"}.intersection(
        sampler_kwargs or ()
    ):
        fix = f"pass it as train({name}=...)"
        refuse("sampler_kwargs", f"not have `{name}`", fix=fix, error=TypeError)


def _look_before_loading(scorer: Scorer, split: PromptSplit, model: Any, *reasons: Any) -> None:
    """Raise if a reward asks for a column that prompts lack; warn of weights that are frozen."""
    rows = [prompts_apart(each[:1])[1] for each in (split.train, split.held_out) if len(each)]
    check_columns(scorer, lambda: [others[0].keys() if others else () for others in rows])
    _warn_of_frozen_weights(model, *reasons)


def _warn_of_frozen_weights(model: Any, *reasons: Any) -> None:
    """Warn if a loaded model has weights that are not trained, and nothing says why."""
    explained = hasattr(model, "v_head") or hasattr(model, "get_base_model")
    if not isinstance(model, nn.Module) or explained or any(each is not None for each in reasons):
        return
    # Embeddings of positions are left out: some are computed once, and never trained.
    weights = [weight for name, weight in model.named_parameters() if "position" not in name]
    frozen = sum(not weight.requires_grad for weight in weights)
    if frozen:
        warnings.warn(
            f"`model` must require gradients for what is to be trained, but {frozen} of its "
            f"{len(weights)} weights do not and stay as they are, perhaps since an earlier run: "
            "call model.requires_grad_(True) to train all, or pass unfrozen_layers or peft_config.",
            stacklevel=4,
        )
