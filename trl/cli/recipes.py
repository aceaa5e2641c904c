"""Recipes and runs as the command line names them: found, read with their flags, and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import config as settings
from trl.cli.words import complain
from trl.config import SettingsError, closest
from trl.config.code import Reader, listing
from trl.config.errors import closest_path, problem, refuse
from trl.config.folder import recipe_folder
from trl.config.places import not_a_model

if TYPE_CHECKING:  # making these classes takes longer than showing what commands there are
    from trl.config.recipe import DataConfig, Recipe, RewardConfig, SupervisedRecipe

OF_MODELS = ("classifier", "control", "reward_model", "steps")
"""Kinds of scorers whose names are those of models."""
Flags = list[tuple[str, str]]
"""Settings of the command line: paths, and what is written for them."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with trl."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: A file, the folder of a run, or the name of a recipe that ships with trl.

    Raises:
        FileNotFoundError: naming the closest one that there is.
    """
    path = Path(name).expanduser()
    for found in (path, path / "recipe.yaml", recipe_folder() / f"{name}.yaml"):
        if found.is_file():
            return found
    beside = [str(each) for each in path.parent.glob("*.y*ml")]
    raise FileNotFoundError(
        f"There is no recipe {name!r}.{closest(name, [*recipe_names(), *beside])} It is neither a "
        f"file nor one that ships with trl ({', '.join(recipe_names()) or 'none do'})."
    )


def read_recipe(
    name: str,
    flags: Sequence[tuple[str, str]] = (),
    trust: Sequence[str] = (),
    *,
    for_chat: bool = False,
) -> Recipe | SupervisedRecipe:
    """Return a recipe with flags over what its file says.

    Args:
        name: See `find_recipe`.
        flags: Paths, as `ppo.learning-rate`, and what is written for them.
        trust: Modules and files whose code may run, besides files beside the recipe.
        for_chat: Whether its files of prompts will not be read, so that they need not be there.

    Raises:
        FileNotFoundError: if there is no such recipe.
        SettingsError: with everything that is wrong.
    """
    from trl.data.sources import beside_recipe

    try:
        path = find_recipe(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(" ".join([str(error), *_unknown(flags)])) from None
    values = settings.read_yaml(path)
    task = dict(flags).get("task", values.get("task"))
    cls = _kind(task)
    recipe = settings.build(cls, values, flags=flags, owner=str(path))
    if not isinstance(recipe, settings.Recipe):
        check_models(recipe, path)
        return recipe  # type: ignore[no-any-return]
    of_run = "votes.sqlite" if cls is settings.PreferencesRecipe else "metrics.jsonl"
    begun = path.name == "recipe.yaml" and (path.parent / of_run).is_file()
    if "out" not in dict(flags) and begun:
        recipe = replace(recipe, out=str(path.parent))  # a run goes on where it is now
    files = {
        name: beside_recipe(getattr(recipe.data, name), path.parent)
        for name in ("prompts", "held_out_prompts")
    }
    recipe = replace(recipe, data=replace(recipe.data, **files))
    recipe = _with_folders(recipe, path.parent)
    absent = () if for_chat else _absent_prompts(recipe.data)
    recipe = with_code(recipe, path, list(flags), trust, absent)
    if isinstance(recipe, settings.PreferencesRecipe):
        people, hidden = recipe.people, recipe.people.simulated
        names = ("gold", "guidelines")
        files = {name: beside_recipe(getattr(people, name), path.parent) for name in names}
        if hidden is not None:
            written = scorers_with_code(hidden.reward, path, list(flags), trust)
            hidden = replace(hidden, reward=written)
        recipe = replace(recipe, people=replace(people, **files, simulated=hidden))
    return recipe  # type: ignore[no-any-return]


def _unknown(flags: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a sentence on each flag that recipes of no kind have."""
    from trl.config.recipe import TASKS, Recipe

    kinds = {Recipe, *TASKS.values()}
    known = {setting.path.replace(".N", "") for kind in kinds for setting in settings.paths(kind)}
    for flag, _ in flags:
        name = re.sub(r"\.\d+(?=\.|$)", "", flag.replace("-", "_"))
        if not any(name == each or f"{name}.".startswith(f"{each}.") for each in known):
            hint = closest_path(name, known).replace("`", "`--", 1).replace("_", "-")
            yield f"And `--{flag.replace('_', '-')}` is not a setting.{hint}"


def _with_folders(recipe: Recipe, folder: Path) -> Recipe:
    """Write out the paths of folders of models, from where the command runs or beside the recipe.

    So a run is gone on with from anywhere.
    """

    def written_out(name: str) -> str:
        places = () if name == "starter" else (Path(name).expanduser(), folder / name)
        return next((str(place.resolve()) for place in places if place.is_dir()), name)

    rewards = tuple(
        replace(each, name=written_out(each.name)) if each.kind in OF_MODELS else each
        for each in recipe.reward
    )
    model = replace(recipe.model, name=written_out(recipe.model.name))
    return replace(recipe, model=model, reward=rewards)


def with_code(
    recipe: Recipe, path: Path, flags: Flags, trust: Sequence[str], problems: Iterable[str]
) -> Recipe:
    """Write out the paths of the Python files of functions and of an environment.

    Raises:
        SettingsError: with `problems`, and for models and code that are not there, and code that
            nobody but the recipe has named.
    """
    reader = _reader(path, flags, trust)
    problems = [*_absent_models(recipe), *problems, *_model_code(recipe, flags)]
    rewards, found = reader.with_files(recipe.reward)
    environment = recipe.environment
    if environment is not None:
        environment, of_environment = reader.with_environment(environment)
        found += of_environment
    _tell_all([*problems, *found], path, flags)
    return replace(recipe, reward=rewards, environment=environment)


def scorers_with_code(
    rewards: tuple[RewardConfig, ...], recipe: Path | None, flags: Flags, trust: Sequence[str]
) -> tuple[RewardConfig, ...]:
    """Write out the paths of the Python files of the functions of some scorers; see `with_code`."""
    rewards, problems = _reader(recipe, flags, trust).with_files(rewards)
    _tell_all(problems, recipe, flags)
    return rewards


def _tell_all(problems: Sequence[str], recipe: Path | None, flags: Flags) -> None:
    """Raise for problems, if there are some, and name who has written what is wrong."""
    given = [f"{name.replace('-', '_')}." for name, _ in flags]
    wrong = [re.sub(r"\[(\d+)\]", r".\1", each.split("`")[1]) + "." for each in problems]
    if problems and all(setting.startswith(tuple(given)) for setting in wrong):
        raise SettingsError("command line", list(problems))
    if problems:
        raise SettingsError("Scoring" if recipe is None else str(recipe), list(problems))


def read_environment(name: str | None, model: str, trust: Sequence[str]) -> Recipe | None:
    """Return the recipe with whose environment a model is to talk.

    Args:
        name: Of the recipe; None: that of the run whose folder, or policy, the model is.
        model: A folder or hub name.
        trust: See `read_recipe`.

    Returns:
        None, if nothing is named and the model is of no run with an environment.

    Raises:
        FileNotFoundError, SettingsError: see `read_recipe`.
        ValueError: if the recipe that is named has no environment.
    """
    folder = Path(model).expanduser()
    files = (
        [folder / "recipe.yaml", folder.parent / "recipe.yaml"]
        if name is None
        else [find_recipe(name)]
    )
    for file in filter(Path.is_file, files):
        values = settings.read_yaml(file)
        if not settings.is_null(values.get("environment")) and "task" not in values:
            recipe: Any = read_recipe(str(file), [("model.name", model)], trust, for_chat=True)
            list_code((*recipe.reward, *recipe.environment.code))
            return recipe  # type: ignore[no-any-return]
    if name is not None:
        refuse("--recipe", "name a recipe with an environment", name, "leave it out")
    return None


def _reader(recipe: Path | None, flags: Flags, trust: Sequence[str]) -> Reader:
    folder = Path.cwd() if recipe is None else recipe.parent
    return Reader(folder, recipe_folder(), trust, " ".join(text for _, text in flags))


def _model_code(recipe: Recipe, flags: Flags) -> Iterator[str]:
    """Yield a sentence if the code of a model would run by the word of the recipe alone."""
    named = any("trust_remote_code" in name + text.replace("-", "_") for name, text in flags)
    if recipe.model.trust_remote_code and not named:
        rule, flag = "be a word of who reads the recipe too", "--model.trust-remote-code"
        fix = f"look at the code of {recipe.model.name}, and add {flag} to run it"
        yield problem("model.trust_remote_code", rule, "true", fix)


def check_models(recipe: Recipe | SupervisedRecipe, path: Path) -> None:
    """Raise for models that are nowhere, before the seconds that it takes to load anything."""
    _tell_all(list(_absent_models(recipe)), path, [])


def _absent_models(recipe: Recipe | SupervisedRecipe) -> Iterator[str]:
    """Yield a sentence on each model that is nowhere."""
    if isinstance(recipe, settings.SupervisedRecipe):
        names = {"model": recipe.model}
    else:
        names = {"model.name": recipe.model.name, "model.tokenizer": recipe.model.tokenizer or ""}
        names |= {
            f"reward[{index}].name": reward.name
            for index, reward in enumerate(recipe.reward)
            if reward.kind not in ("function", "endpoint", "environment")
        }
    rule = "be the folder of a model, or its name on the Hugging Face Hub"
    for setting, name in names.items():
        if name and (told := not_a_model(name)):
            yield problem(setting, rule, f"{name!r}, which {told}")


def _absent_prompts(data: DataConfig) -> Iterator[str]:
    """Yield a sentence on each file of prompts that is nowhere."""
    from trl.data.sources import missing

    for setting in ("prompts", "held_out_prompts"):
        given = getattr(data, setting) or ()
        sources = (given,) if isinstance(given, str) else given
        yield from filter(None, (missing(source, f"data.{setting}") for source in sources))


def list_code(rewards: Sequence[RewardConfig], model: str | None = None) -> None:
    """Name the code that is about to run: no recipe can be so quiet that it is not."""
    for line in listing(rewards, model):
        complain(f"trl: {line}.")


def kind_of(arguments: list[str]) -> type:
    """Return which dataclass the recipe among some arguments is of, for its help."""
    try:
        kind: type = _kind(settings.read_yaml(find_recipe(*arguments[:1])).get("task"))
        return kind
    except (OSError, SettingsError, TypeError):
        return settings.Recipe


def _kind(task: Any) -> Any:
    """Return which dataclass the recipes of a task are of; one of them refuses others."""
    from trl.config.recipe import TASKS

    return settings.Recipe if task is None else TASKS.get(str(task), settings.ClassifierRecipe)


def check_resume(recipe: Recipe | SupervisedRecipe, resume: str | None) -> None:
    """Raise if the run cannot be gone on with, as far as that is seen in a moment."""
    if resume is None:
        return
    if hasattr(recipe, "task") and resume != "auto":
        raise ValueError(f"--resume must stand alone for a {recipe.task}, got {resume!r}.")
    if resume != "auto" and not Path(resume).expanduser().is_dir():
        hint = closest(resume, map(str, Path(recipe.out).expanduser().glob("checkpoints/*")))
        raise FileNotFoundError(
            f"--resume must be auto or the folder of a checkpoint, got {resume!r}.{hint}"
        )


def folder(name: str) -> Path:
    """Return the folder of a run."""
    path = Path(name).expanduser()
    if not path.is_dir():
        hint = closest(str(path), map(str, filter(Path.is_dir, path.parent.glob("*"))))
        raise FileNotFoundError(f"There is no run in {name!r}: name the folder of one.{hint}")
    return path


def check_beside_runs(name: str) -> None:
    """Raise if a name stands for nothing in a folder of runs; else it may be one of the hub."""
    path = Path(name).expanduser()
    beside_runs = path.parent != Path() and any(path.parent.glob("*/recipe.yaml"))
    if not path.exists() and (beside_runs or name.startswith(("/", "./", "../", "~"))):
        folder(name)
