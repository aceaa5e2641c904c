"""What of a recipe is code, and by whose word it runs.

A recipe is data: who writes one must not decide what runs on the machine of who reads it. Code in a
file beside the recipe runs since its reader named the recipe by its path, and so does what ships
with trl. All else runs only after the reader has named it too: `--trust MODULE`.
"""

from __future__ import annotations

import ast
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trl.config.errors import closest, problem
from trl.config.folder import recipe_folder

if TYPE_CHECKING:  # making these classes takes longer than showing what commands there are
    from trl.config.recipe import EnvironmentConfig, Recipe, RewardConfig

RECIPE_MODULE = "trl_recipe_"
"""How the names of modules begin that are made of files beside recipes."""

SCRIPT = "__main__"
"""What is of no module that a command could import."""

Trust = Sequence[str]
"""Modules, packages and files that the reader of a recipe has named."""

UNISOLATED = "--allow-unisolated"
"""Stands among them if answers may be run, as the kind code does, without a world of their own."""


def place_of(reward: RewardConfig) -> str:
    """Return the module or file that a function comes from; nothing: it is another scorer."""
    return reward.name.rpartition(":")[0] if reward.kind == "function" else ""


def find_file(given: str, *folders: Path) -> Path | None:
    """Return the file of that name or path in the first of the folders that has it."""
    places = (folder / Path(given).expanduser() for folder in folders)
    return next((place.resolve() for place in places if place.is_file()), None)


def names_of(file: Path) -> set[str]:
    """Return the names that a file of code gives to something, without running it.

    None where only running it can tell: it imports all of another, or is no Python.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # to be told when it runs
        return set()
    found = {getattr(node, "name", None) or getattr(node, "id", None) for node in ast.walk(tree)}
    imported = [each for node in ast.walk(tree) for each in getattr(node, "names", ())]
    found |= {getattr(each, "asname", None) or getattr(each, "name", each) for each in imported}
    return set() if "*" in found or "__getattr__" in found else set(filter(None, found))


def is_trusted(module: str, trust: Trust) -> bool:
    """Tell whether the reader has named a module, or a package that it is in."""
    return any(f"{module}.".startswith(f"{name}.") for name in trust)


def distrusted(path: str, name: str, place: str) -> str:
    """Return the sentence on a function that nobody but the recipe has named."""
    rule = "name a function, or a class, of a file beside the recipe, as file.py:name"
    if place == SCRIPT:
        got = f"{name!r}, of the Python script that made the run"
        way = "go on in that script (resume='auto'), or leave it out (--no-environment)"
        return problem(path, rule, got, way)
    fix = f"look at that code, and add --trust {shlex.quote(place)} to run it"
    if place.endswith(".py"):
        fix += "; a run may also be gone on with by the recipe beside it that it began from"
    return problem(path, rule, f"{name!r}, which is elsewhere", fix)


@dataclass(frozen=True)
class Reader:
    """Who reads a recipe, and what may run by their word.

    Args:
        folder: That of the recipe, or where the command runs if there is none.
        shipped: That of the recipes that ship with trl.
        trust: What else may run.
        typed: The texts of flags: what is written there is looked for where the command runs.
    """

    folder: Path
    shipped: Path
    trust: Trust = ()
    typed: str = ""

    def with_environment(
        self, environment: EnvironmentConfig
    ) -> tuple[EnvironmentConfig, list[str]]:
        """Write out the paths of the files of an environment and of tools; see `with_files`."""
        names = ["name"] if environment.name else []
        names += [f"tools[{index}]" for index in range(len(environment.tools))]
        paths = [f"environment.{name}" for name in names]
        found, problems = self.with_files(environment.code, paths)
        written = [each.name for each in found]
        name = written.pop(0) if environment.name else None
        return replace(environment, name=name, tools=tuple(written)), problems

    def with_files(
        self, rewards: tuple[RewardConfig, ...], paths: Sequence[str] = ()
    ) -> tuple[tuple[RewardConfig, ...], list[str]]:
        """Write out the paths of the files of functions.

        Args:
            rewards: Of a recipe.
            paths: What errors call them; none: rewards.

        Returns:
            The rewards, and a sentence on each function that is not there or may not run.
        """
        found: list[RewardConfig] = []
        problems: list[str] = []
        for index, reward in enumerate(rewards):
            place, path = place_of(reward), paths[index] if paths else f"reward[{index}].name"
            if not place.endswith(".py"):
                if place == SCRIPT or (place and not is_trusted(place, self.trust)):
                    problems.append(distrusted(path, reward.name, place))
            elif file := find_file(place, self.folder, Path.cwd(), self.shipped):
                if not self._may_run(file, reward.name):
                    problems.append(distrusted(path, reward.name, str(file)))
                function = reward.name.rpartition(":")[2]
                reward = replace(reward, name=f"{file}:{function}")
                names = names_of(file)
                if names and function not in names:  # said before anything is imported
                    rule = f"name a function of {file}, which has no function {function!r}"
                    problems.append(problem(path, rule) + closest(function, sorted(names)))
            else:
                folder = Path.cwd() if reward.name in self.typed else self.folder
                beside = (folder / Path(place).expanduser()).resolve()
                hint = closest(beside.name, [each.name for each in beside.parent.glob("*.py")])
                rule, got = "name a file that is there", f"{place!r}, but there is no {beside}"
                problems.append(problem(path, rule, got, "mend the path") + hint)
            found.append(reward)
        return tuple(found), problems

    def _may_run(self, file: Path, name: str) -> bool:
        folders = [self.folder, self.shipped, *([Path.cwd()] if name in self.typed else [])]
        named = [Path(each).expanduser().resolve() for each in self.trust]
        return file in named or any(file.is_relative_to(each.resolve()) for each in folders)


# -- before it runs --------------------------------------------------------------------------------


def listing(rewards: Sequence[RewardConfig], model: str | None = None) -> Iterator[str]:
    """Yield a line for each file that is to run and does not ship with trl, and for each module.

    Args:
        rewards: With the paths of their files written out.
        model: The folder or name of a model that runs code of its own.
    """
    for place in dict.fromkeys(filter(None, map(place_of, rewards))):
        if not place.endswith(".py"):
            yield f"runs code of the module {place}"
        elif not Path(place).is_relative_to(recipe_folder().resolve()):
            yield from map(described, [Path(place), *neighbours(Path(place))])
    if model is not None:
        files = sorted(Path(model).expanduser().glob("*.py"))
        yield from map(described, files) if files else [f"runs code of the model {model}"]


def described(file: Path) -> str:
    """Return path, size and hash of a file of code."""
    text = file.read_bytes()
    return f"runs {file} ({len(text)} bytes, SHA-256 {hashlib.sha256(text).hexdigest()})"


def neighbours(file: Path) -> list[Path]:
    """Return the files beside a file that it imports, and those that they import."""
    from modulefinder import ModuleFinder

    finder = ModuleFinder([str(file.parent)])
    try:
        finder.run_script(str(file))  # which reads it, and runs nothing
    except (SyntaxError, ValueError):  # to be told when it runs
        return []
    found = [getattr(module, "__file__", None) for module in finder.modules.values()]
    return sorted({Path(each).resolve() for each in found if each} - {file})


def flags_to_go_on(recipe: Recipe, folder: Path) -> str:
    """Return the flags by which the reader of a run's own recipe names the code of it again."""
    code = (*recipe.reward, *(recipe.environment.code if recipe.environment else ()))
    places = dict.fromkeys(filter(None, map(place_of, code)))
    own = [folder.resolve(), recipe_folder().resolve()]
    others = [each for each in places if not any(Path(each).is_relative_to(own_) for own_ in own)]
    remote = " --model.trust-remote-code" if recipe.model.trust_remote_code else ""
    return "".join(f" --trust {shlex.quote(place)}" for place in others) + remote
