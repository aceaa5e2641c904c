"""What a recipe names, as objects: the policy and its tokenizer, the sampler, the scorers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trl import starter
from trl.config import SettingsError, closest
from trl.config.folder import recipe_folder
from trl.config.recipe import (
    STARTER,
    ModelConfig,
    Recipe,
    RewardConfig,
    ScheduleConfig,
)
from trl.evaluation.classifier import ClassifierScorer
from trl.evaluation.control import ControlScorer
from trl.evaluation.endpoint import EndpointScorer
from trl.evaluation.function import FunctionScorer
from trl.evaluation.reward_model import RewardModelScorer
from trl.evaluation.weighted_sum import WeightedSum
from trl.models.with_value_head import load_policy
from trl.optimization.adam import linear_decay
from trl.rollout.sampler import Sampler

TAKEN = ("mean", "median", "std")
"""Names under `reward/` that no scorer may have."""


def model_name(name: str) -> str:
    """Return the folder or hub name of a language model."""
    return str(starter.LANGUAGE_MODEL) if name == STARTER else os.path.expanduser(name)


def load_tokenizer(settings: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the policy's tokenizer."""
    where = {"revision": settings.revision} if settings.tokenizer is None else {}
    return AutoTokenizer.from_pretrained(
        model_name(settings.tokenizer or settings.name),
        trust_remote_code=settings.trust_remote_code,
        **where,
    )


def load_model(settings: ModelConfig) -> nn.Module:
    """Return the policy, with a value head; its new weights come from torch's random numbers."""
    where: dict[str, Any] = {}
    if settings.revision is not None:
        where["revision"] = settings.revision
    if settings.trust_remote_code:
        where["trust_remote_code"] = True
    with warnings.catch_warnings():
        # That peft turned the matrices of GPT-2 about, which it should.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return load_policy(
            model_name(settings.name),
            peft_config=_lora(settings),
            unfrozen_layers=settings.unfrozen_layers,
            **where,
        )


def _lora(settings: ModelConfig) -> Any:
    """Return the adapter's configuration in the terms of peft; None: no adapter."""
    lora = settings.lora
    if lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("`model.lora` needs the package peft: pip install peft.") from None
    layers: str | list[str] = lora.target_modules
    if layers != "all-linear":
        layers = [part.strip() for part in lora.target_modules.split(",")]
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers
    )


def make_sampler(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, *, group_size: int | None = None
) -> Sampler:
    """Return the sampler of a recipe, with random numbers, and perhaps groups, of its own."""
    settings = recipe.sampling
    longest = settings.max_new_tokens
    shortest = longest if settings.shortest_limit is None else settings.shortest_limit
    return Sampler(
        tokenizer,
        max_new_tokens=(shortest, longest),
        temperature=recipe.ppo.temperature,
        eos_token_id="tokenizer" if settings.eos else None,
        stop_strings=settings.stop_strings,
        group_size=group_size or settings.group_size,
        seed=seed,
        max_rows=settings.max_rows,
        add_bos=settings.add_bos and tokenizer.bos_token_id is not None,
    )


def make_schedule(settings: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate of each step, 0 for the first."""
    return partial(
        schedule_factor,
        kind=settings.kind,
        warmup_steps=settings.warmup_steps,
        total_steps=total_steps,
        final=settings.final,
    )


def schedule_factor(
    step: int, *, kind: str, warmup_steps: int, total_steps: int, final: float
) -> float:
    """Factor on the learning rate of a step.

        step < warmup_steps:  (step + 1) / (warmup_steps + 1)
        after that, with x = (step − warmup_steps) / (total_steps − warmup_steps):
            linear    final + (1 − final)·(1 − x)
            cosine    final + (1 − final)·½(1 + cos πx)
            constant  1

    Args:
        step: Steps already made: 0, 1, ….
        kind: linear, cosine or constant.
        warmup_steps: Over which it rises.
        total_steps: Of the whole run; later ones get `final` (linear and cosine).
        final: Share that is left at the end.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    left = linear_decay(step - warmup_steps, total_steps - warmup_steps)
    if kind == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return final + (1 - final) * left


# -- scorers -------------------------------------------------------------------------------------


def load_scorer(rewards: Sequence[RewardConfig]) -> tuple[WeightedSum, WeightedSum]:
    """Return the scorer to train with, and that of the evaluation, which measures more.

    Raises:
        SettingsError: for a function that is not there, naming its place in the recipe.
        OSError, ValueError: for a model that cannot be loaded, or has no such label.
    """
    loaded: dict[str, ClassifierScorer] = {}
    modules: dict[str, ModuleType] = {}
    parts = []
    for index, settings in enumerate(rewards):
        scorer = _scorer(settings, f"reward[{index}]", loaded, modules)
        scorer.name = settings.title or _title(settings)
        if scorer.name in TAKEN:
            raise SettingsError(
                "Recipe",
                [
                    f"`reward[{index}].title` must not be one of {list(TAKEN)}, which are "
                    f"figures of the whole reward, got {scorer.name!r}: set another title."
                ],
            )
        parts.append((scorer, settings.weight))
    return WeightedSum([part for part in parts if part[1] != 0]), WeightedSum(parts)


def _scorer(
    settings: RewardConfig,
    path: str,
    loaded: dict[str, ClassifierScorer],
    modules: dict[str, ModuleType],
) -> Any:
    if settings.kind == "function":
        return FunctionScorer(load_function(settings.name, f"{path}.name", modules))
    if settings.kind == "endpoint":
        return EndpointScorer(settings.name)
    if settings.kind == "reward_model":
        return RewardModelScorer(os.path.expanduser(settings.name))
    starts = settings.name == STARTER
    name = str(starter.CLASSIFIER) if starts else os.path.expanduser(settings.name)
    label = int(settings.label) if settings.label.isdecimal() else settings.label
    first = loaded.get(name)  # a classifier that is named twice is loaded once
    model, tokenizer = (first.model, first.tokenizer) if first else (name, None)
    loaded[name] = scorer = ClassifierScorer(model, tokenizer, label=label, output=settings.output)
    if settings.kind == "classifier":
        return scorer
    return ControlScorer(scorer, settings.targets, weights=settings.target_weights)


def _title(settings: RewardConfig) -> str:
    if settings.kind == "classifier":
        return f"{settings.label.lower()}_{settings.output}"
    if settings.kind == "function":
        return settings.name.rpartition(":")[2]
    return settings.kind


def load_function(
    name: str, path: str, modules: dict[str, ModuleType] | None = None
) -> Callable[[list[str]], Any]:
    """Return the function `package.module:function`, or `file.py:function`.

    Args:
        name: Where it is.
        path: The setting's place in the recipe, for errors.
        modules: Files that were executed already; this one is added.

    Raises:
        SettingsError: if it is not there, or is no function.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        module = _module_of_file(Path(place), path, {} if modules is None else modules)
    else:
        module = _module(place, path)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise SettingsError(
            "Recipe",
            [
                f"`{path}` must name a function of {place}, which has no function "
                f"{attribute!r}.{closest(attribute, known)}"
            ],
        )
    return function


def _module_of_file(file: Path, path: str, modules: dict[str, ModuleType]) -> ModuleType:
    given, file = file, file.expanduser()
    if not file.is_file():
        file = recipe_folder() / file  # where the functions of the recipes that ship lie
    if not file.is_file():
        raise SettingsError(
            "Recipe",
            [
                f"`{path}` must name a file that is there, got {str(given)!r}, looked for in "
                f"{Path.cwd()}: mend the path."
            ],
        )
    file = file.resolve()
    name = f"trl_recipe_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in modules:  # two functions of one recipe share what their file keeps
        return modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _look_in(file.parent)  # it may import its neighbours
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    modules[name] = module
    return module


def _look_in(folder: Path) -> None:
    """Let imports find the modules of a folder, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _module(name: str, path: str) -> ModuleType:
    _look_in(Path.cwd())  # `trl` is a script: unlike `python`, it does not look here
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SettingsError(
            "Recipe",
            [f"`{path}` must name a module that can be imported, got {name!r} ({error})."],
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars of transformers, and its advice, off the screen."""
    was_on = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers follow from the seed; outside they go on as before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
