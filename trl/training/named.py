"""What a recipe names: scorers, environments and the functions of users."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from trl import evaluation, starter
from trl.config import SettingsError, closest
from trl.config.code import RECIPE_MODULE, UNISOLATED, Trust, distrusted, find_file, is_trusted
from trl.config.errors import problem
from trl.config.folder import recipe_folder
from trl.config.recipe import ENVIRONMENT, HUMAN, STARTER, EnvironmentConfig, RewardConfig
from trl.environments import EnvironmentReward, Episodes, episodes_of
from trl.environments.episodes import Limits
from trl.evaluation import WeightedSum
from trl.evaluation.weighted_sum import Columns, check_columns
from trl.rollout.sampler import Sampler

VOTES = "human.votes.sqlite"
"""What people answered a run, in its folder."""
TAKEN = ("mean", "median", "std")
"""Names under `reward/` that no scorer may have."""


def refuse_setting(
    name: str, rule: str, got: str = "", fix: str = "", *, hint: str = ""
) -> NoReturn:
    """Say that a setting of a recipe must be another."""
    raise SettingsError("Recipe", [problem(name, rule, got, fix) + hint])


def load_scorer(
    rewards: Sequence[RewardConfig],
    trust: Trust = (),
    columns: Columns | None = None,
    *,
    out: str = "",
) -> tuple[WeightedSum, WeightedSum]:
    """Return the scorer to train with, and that of the evaluation, which measures more.

    Args:
        rewards: The scorers.
        trust: Modules and packages whose functions may run.
        columns: See `check_columns`.
        out: The folder of what people answer, if no file of it is named.

    Raises:
        SettingsError: for a function that is not there, naming its place in the recipe.
        OSError, ValueError: for a model that cannot be loaded, or has no such label; for a column
            that a function asks for in vain.
    """
    made, loaded = dict[int, tuple[Any, float]](), dict[str, Any]()
    # Functions first: what one of them lacks is told before a model is loaded.
    for index in sorted(range(len(rewards)), key=lambda index: rewards[index].kind != "function"):
        settings = rewards[index]
        scorer, name = _scorer(settings, f"reward[{index}].name", loaded, trust, out)
        scorer.name = settings.title or name
        if scorer.name in TAKEN:
            rule = f"not be one of {list(TAKEN)}, which are figures of the whole reward"
            refuse_setting(f"reward[{index}].title", rule, repr(scorer.name), "set another title")
        made[index] = scorer, settings.weight
        if columns and settings.kind == "function":
            check_columns(scorer, columns)
    parts = [made[index] for index in range(len(rewards))]
    for settings, (scorer, _) in zip(rewards, parts, strict=True):
        if settings.kind == HUMAN:
            scorer.fall_back_on(settings.arguments.get("fallback"), [each for each, _ in parts])
    return WeightedSum([part for part in parts if part[1] != 0]), WeightedSum(parts)


def _scorer(
    settings: RewardConfig, path: str, loaded: dict[str, Any], trust: Trust, out: str
) -> tuple[Any, str]:
    """Return a scorer, and its name unless it has a title; `loaded` is what others have loaded."""
    if settings.kind == "function":
        function = load_function(settings.name, path, loaded, trust)
        scorer = evaluation.FunctionScorer(function, **settings.arguments)
        return scorer, settings.name.rpartition(":")[2]
    if settings.kind == "endpoint":
        return evaluation.EndpointScorer(settings.name), settings.kind
    if settings.kind == ENVIRONMENT:
        return EnvironmentReward(), settings.kind
    if settings.kind in (HUMAN, *evaluation.CHECKS):
        return _check(settings, path.replace("name", "arguments"), trust, out), settings.kind
    name = os.path.expanduser(settings.name)
    if settings.kind == "reward_model":
        return evaluation.RewardModelScorer(name, **settings.arguments), settings.kind
    if settings.kind == "steps":
        return evaluation.StepScorer(name, **settings.arguments), settings.kind
    how: Any = {"label": int(settings.label) if settings.label.isdecimal() else settings.label}
    if name in loaded:  # a classifier that is named twice is loaded once
        how["tokenizer"] = loaded[name].tokenizer
    model = loaded[name].model if name in loaded else name
    model = str(starter.CLASSIFIER) if model == STARTER else model
    scorer = evaluation.ClassifierScorer(model, **how, output=settings.output)
    loaded[name] = scorer
    if settings.kind == "classifier":
        return scorer, f"{settings.label.lower()}_{settings.output}"
    control = evaluation.ControlScorer(scorer, settings.targets, weights=settings.target_weights)
    return control, settings.kind


def load_environment(
    settings: EnvironmentConfig, trust: Trust = ()
) -> Callable[[Sampler], Episodes]:
    """Return what makes a sampler one of conversations with the environment that is named.

    Raises:
        SettingsError: for code that is not there, or may not run.
    """
    loaded, place = dict[str, Any](), "environment.name"
    found = settings.name and load_function(settings.name, place, loaded, trust)
    tools = [
        load_function(name, f"environment.tools[{index}]", loaded, trust)
        for index, name in enumerate(settings.tools)
    ]
    given = {field.name: getattr(settings, field.name) for field in fields(Limits)}
    return episodes_of(found, tools, seconds=settings.seconds, **given)


def _check(settings: RewardConfig, path: str, trust: Trust, out: str) -> Any:
    """Return the scorer of one of the kinds that need no model."""
    cls: Any = getattr(evaluation, evaluation.CHECKS.get(settings.kind, "HumanScorer"))
    given = dict(settings.arguments)
    if settings.kind == HUMAN:
        given.pop("fallback", None)  # a scorer, which is looked for among the others
        given["store"] = VOTES if settings.name == STARTER else settings.name
        given["store"] = os.path.join(out * (settings.name == STARTER), given["store"])
    if "allow_unisolated" in settings.arguments:
        rule = "hold no allow_unisolated, a word of who reads the recipe"
        refuse_setting(path, rule, fix=f"add {UNISOLATED} to the command")
    allowed = {"allow_unisolated": True} if settings.kind == "code" and UNISOLATED in trust else {}
    try:
        inspect.signature(cls).bind(**given)
        return cls(**given, **allowed)
    except TypeError as error:
        refuse_setting(path, f"be arguments of {cls.__name__}", fix=str(error))
    except ValueError as error:
        found = getattr(error, "found", [str(error)])
        raise SettingsError("Recipe", [f"`{path}.{told[1:]}" for told in found]) from None


def load_function(
    name: str, path: str, loaded: dict[str, Any] | None = None, trust: Trust = ()
) -> Callable[[list[str]], Any]:
    """Return the function `file.py:function`, or `package.module:function` of a trusted module.

    Args:
        name: Where it is.
        path: The setting's place in the recipe, for errors.
        loaded: Files that were executed already; this one is added.
        trust: Modules and packages that may be imported. A recipe names `subprocess:call` as
            easily as a reward.

    Raises:
        SettingsError: if it is not there, may not run, or is no function.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        module = _module_of_file(place, path, {} if loaded is None else loaded)
    elif not is_trusted(place, trust):
        raise SettingsError("Recipe", [distrusted(path, name, place)])
    else:
        _look_in(Path.cwd())  # `trl` is a script: unlike `python`, it does not look here
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            refuse_setting(path, "name a module that can be imported", f"{place!r} ({error})")
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        rule = f"name a function of {place}, which has no function {attribute!r}"
        refuse_setting(path, rule, hint=closest(attribute, known))
    return function


def _module_of_file(given: str, path: str, loaded: dict[str, Any]) -> ModuleType:
    # Here, or where the functions of the recipes that ship lie.
    file = find_file(given, Path.cwd(), recipe_folder())
    if file is None:
        got = f"{given!r}, looked for in {Path.cwd()}"
        refuse_setting(path, "name a file that is there", got, "mend the path")
    name = f"{RECIPE_MODULE}{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name not in loaded:  # two functions of one recipe share what their file keeps
        spec: Any = importlib.util.spec_from_file_location(name, file)
        # Dataclasses and pickle look a module up by its name.
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        _look_in(file.parent)  # it may import its neighbours
        # What was listed: a .pyc that lies beside the file may be of other code.
        exec(spec.loader.source_to_code(file.read_bytes(), str(file)), vars(module))
        loaded[name] = module
    return loaded[name]  # type: ignore[no-any-return]


def _look_in(folder: Path) -> None:
    """Let imports find the modules of a folder, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
