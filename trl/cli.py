"""The command `trl`.

    trl train RECIPE         run a recipe: a YAML file, or the name of one that ships with trl
    trl demo                 tune a small GPT-2 to write positive film reviews
    trl sample MODEL         let a policy, or the policy of a run, write
    trl score TEXTS          score texts as a recipe does
    trl report RUN ...       write the report of a run, or of several side by side
    trl compare RUN ...      show how runs ended and what they did differently

    trl COMMAND --help       its options and settings
    trl --version

Every setting of a recipe is a flag: `ppo.learning_rate` there is `--ppo.learning-rate` here, and
the text under the field of the dataclass is its help. Neither torch nor transformers is imported
before all settings are known to be good.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import trl
from trl import config as settings
from trl.config import SettingsError, closest
from trl.config.folder import recipe_folder

if TYPE_CHECKING:  # making these classes takes longer than showing what commands there are
    from trl.config.listing import Setting
    from trl.config.recipe import ClassifierRecipe, Recipe, RewardConfig

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130

Flags = list[tuple[str, str]]
"""Settings of the command line: paths, and what is written for them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 if all went well, 1 if the run could not go on, 2 for a user's error, 130 for Ctrl-C.
    """
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        _complain("\ntrl: interrupted.")
        return INTERRUPTED
    except SettingsError as error:
        _complain(_told(error))
        return USAGE_ERROR
    except Exception as error:
        if not _is_explained(error):
            raise
        print(f"trl: {_sentence(error)}", file=sys.stderr)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        users = isinstance(error, (ImportError, OSError, TypeError, ValueError)) and not full
        return USAGE_ERROR if users else FAILED


def _run(arguments: list[str]) -> int:
    command, *others = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: trl COMMAND ...\n{(__doc__ or '').partition('.')[2]}".rstrip())
    elif command == "--version":
        print(f"trl {trl.__version__}")
    elif command in COMMANDS:
        return COMMANDS[command](others)
    else:
        _complain(
            f"trl: unknown command {command!r}.{closest(command, COMMANDS)} See `trl --help`."
        )
        return USAGE_ERROR
    return 0


# -- the commands --------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl train",
        usage="trl train RECIPE [SETTING ...] [--print-config] [--resume [CHECKPOINT]]",
        description=f"Run a recipe. Those that ship with trl: {', '.join(recipe_names())}.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, the folder of a run, or the name of a recipe"
    )
    parser.add_run_options()
    named = arguments and not arguments[0].startswith("-")
    shown = _kind_of(arguments[0]) if named else settings.Recipe
    options, flags = parser.parse(arguments, shown)
    return _start(options, options.recipe, flags)


def _demo(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl demo",
        usage="trl demo [SETTING ...] [--print-config] [--resume [CHECKPOINT]]",
        description="Tune a small GPT-2 to write positive film reviews, and show what changed: "
        "`trl train sentiment --out runs/demo`.",
    )
    parser.add_run_options()
    options, flags = parser.parse(arguments, settings.Recipe)
    return _start(options, "sentiment", [("out", "runs/demo"), *flags])


def _start(options: argparse.Namespace, name: str, flags: Flags) -> int:
    """Run a recipe, or print it."""
    recipe = read_recipe(name, flags)
    _check_resume(recipe, options.resume)
    if options.print_config:
        if _is_main_process():
            print(settings.dump(recipe, texts=True), end="")
        return 0
    if isinstance(recipe, settings.ClassifierRecipe):
        from trl.training.classifier import train_classifier  # torch and transformers: seconds

        train_classifier(recipe, resume=options.resume is not None)
        return 0
    from trl.training.run import run_recipe

    result = run_recipe(recipe, resume=options.resume)
    return INTERRUPTED if getattr(result, "interrupted", False) else 0


def _sample(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl sample",
        usage="trl sample MODEL [--prompts FILE | --prompt TEXT ...] [OPTION ...]",
        description="Let a policy write: a model's folder or hub name, or the folder of a run.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, or starter")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to go on from")
    prompts.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, or a table with a column of them"
    )
    number = parser.add_argument
    number("--n", type=int, default=1, help="responses to each prompt (default: %(default)s)")
    number("--max-new-tokens", type=int, default=48, help="most tokens (default: %(default)s)")
    number("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    number("--top-k", type=int, default=0, help="among the k likeliest tokens (default: all)")
    number("--top-p", type=float, default=1.0, help="among those of this share (default: all)")
    number("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write lines of JSON there; -: to the screen")
    options = parser.parse_args(arguments)
    _check_beside_runs(options.model)
    from trl.training import tools

    given = options.prompt or tools.read_prompts(options.prompts)
    rows = tools.sample(
        options.model,
        given,
        n=options.n,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    tools.show(rows, options.out)
    return 0


def _score(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl score",
        usage="trl score TEXTS [--recipe RECIPE] [--reward.N.SETTING ...] [--out FILE]",
        description="Score texts by the rewards of a recipe; without one, by the sentiment "
        "classifier that ships with trl.",
    )
    parser.add_argument(
        "texts",
        metavar="TEXTS",
        help="a file with one text a line, a table with a column text, or prompt and response; "
        "-: lines of the standard input",
    )
    parser.add_argument("--recipe", help="a YAML file, or the name of a recipe")
    parser.add_argument("--out", metavar="FILE", help="write lines of JSON there; -: to the screen")
    options, flags = parser.parse(arguments, settings.Scoring)
    values, owner = {}, None
    if options.recipe is not None:
        path = find_recipe(options.recipe)
        owner, values = str(path), settings.read_yaml(path)
        values = {"reward": values["reward"]} if "reward" in values else {}
    scoring = settings.build(settings.Scoring, values, flags=flags, owner=owner)
    if options.recipe is not None:
        scoring = replace(scoring, reward=_beside(scoring.reward, path))
    from trl.training import tools

    tools.show(tools.score_texts(tools.read_texts(options.texts), scoring.reward), options.out)
    return 0


def _report(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl report",
        usage="trl report RUN [RUN ...] [--out FOLDER]",
        description="Write the report of a run, or of several side by side: one HTML file.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where report.html goes, or compare.html if there are several runs, or the name of "
        "that file; default: the folder of the first run",
    )
    options = parser.parse_args(arguments)
    runs = [_folder(run) for run in options.runs]
    from trl.report import write_report

    out = Path(options.out or runs[0]).expanduser()
    if len(runs) > 1 and out.suffix != ".html":
        out /= "compare.html"  # the page of the run itself stays
    print(write_report(runs, out))
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _Parser(
        prog="trl compare",
        usage="trl compare RUN RUN ...",
        description="Show how runs ended on the held-out prompts, and which settings differ.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    runs = [_folder(run) for run in parser.parse_args(arguments).runs]
    from rich.console import Console

    from trl.report import compare

    Console().print(compare(runs))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "demo": _demo,
    "sample": _sample,
    "score": _score,
    "report": _report,
    "compare": _compare,
}


# -- recipes -------------------------------------------------------------------------------------


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
    shipped = recipe_folder() / f"{name}.yaml"
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if name in recipe_names():
        return shipped
    beside = [str(each) for each in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(name, [*recipe_names(), *beside], 1, 0.6)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(
        f"There is no recipe {name!r}, neither a file nor one that ships with trl "
        f"({', '.join(recipe_names()) or 'none do'}).{hint}"
    )


def read_recipe(name: str, flags: Sequence[tuple[str, str]] = ()) -> Recipe | ClassifierRecipe:
    """Return a recipe with flags over what its file says.

    Args:
        name: See `find_recipe`.
        flags: Paths, as `ppo.learning-rate`, and what is written for them.

    Raises:
        FileNotFoundError: if there is no such recipe.
        SettingsError: with everything that is wrong.
    """
    path = find_recipe(name)
    values = settings.read_yaml(path)
    task = dict(flags).get("task", values.get("task"))
    if task not in (None, "classifier"):
        hint = closest(str(task), ["classifier"])
        problem = f"`task` must be classifier, or left out for PPO, got {str(task)!r}.{hint}"
        raise SettingsError(str(path), [problem])
    if task == "classifier":
        return settings.build(settings.ClassifierRecipe, values, flags=flags, owner=str(path))
    recipe = settings.build(settings.Recipe, values, flags=flags, owner=str(path))
    if "out" not in dict(flags) and (path.parent / "metrics.jsonl").is_file():
        recipe = replace(recipe, out=str(path.parent))  # a run goes on where it is now
    return replace(recipe, reward=_beside(recipe.reward, path))


def _beside(rewards: tuple[RewardConfig, ...], recipe: Path) -> tuple[RewardConfig, ...]:
    """Write out the paths of the Python files of functions that are beside the recipe.

    Raises:
        SettingsError: for files that are neither there, nor here, nor among those that ship.
    """
    found: list[RewardConfig] = []
    problems: list[str] = []
    for index, reward in enumerate(rewards):
        file, _, function = reward.name.rpartition(":")
        path = Path(file).expanduser()
        beside = (recipe.parent / path).resolve()
        if reward.kind == "function" and file.endswith(".py"):
            if beside.is_file():
                reward = replace(reward, name=f"{beside}:{function}")
            elif not path.is_file() and not (recipe_folder() / path).is_file():
                there = [each.name for each in beside.parent.glob("*.py")]
                problems.append(
                    f"`reward[{index}].name` must name a file that is there, got {file!r}, but "
                    f"there is no {beside}: mend the path.{closest(beside.name, there)}"
                )
        found.append(reward)
    if problems:
        raise SettingsError(str(recipe), problems)
    return tuple(found)


def _kind_of(name: str) -> type:
    """Return which dataclass a recipe is of, for its help."""
    try:
        values = settings.read_yaml(find_recipe(name))
    except (OSError, SettingsError):
        return settings.Recipe
    is_classifier = values.get("task") == "classifier"
    return settings.ClassifierRecipe if is_classifier else settings.Recipe


def _check_resume(recipe: Recipe | ClassifierRecipe, resume: str | None) -> None:
    """Raise if the run cannot be gone on with, as far as that is seen in a moment."""
    if resume is None:
        return
    if isinstance(recipe, settings.ClassifierRecipe) and resume != "auto":
        raise ValueError(f"--resume must stand alone for a classifier, got {resume!r}.")
    checkpoint = Path(resume).expanduser()
    if resume != "auto" and not checkpoint.is_dir():
        folder = Path(recipe.out).expanduser() / "checkpoints"
        near = difflib.get_close_matches(resume, [str(path) for path in folder.glob("*")], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"--resume must be auto or the folder of a checkpoint, got {resume!r}.{hint}"
        )


def _folder(name: str) -> Path:
    """Return the folder of a run."""
    path = Path(name).expanduser()
    if not path.is_dir():
        there = [str(each) for each in path.parent.glob("*") if each.is_dir()]
        near = difflib.get_close_matches(str(path), there, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"There is no run in {name!r}: name the folder of one.{hint}")
    return path


def _check_beside_runs(name: str) -> None:
    """Raise if a name stands for nothing in a folder of runs; else it may be one of the hub."""
    path = Path(name).expanduser()
    beside_runs = path.parent != Path() and any(path.parent.glob("*/recipe.yaml"))
    if not path.exists() and (beside_runs or name.startswith(("/", "./", "../", "~"))):
        _folder(name)


# -- arguments -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, names the option closest to an unknown one, and leaves settings."""

    def __init__(self, **texts: Any) -> None:
        super().__init__(allow_abbrev=False, **texts)

    def add_run_options(self) -> None:
        """Add the options of a command that runs a recipe."""
        self.add_argument(
            "--print-config", action="store_true", help="check and print the settings, no more"
        )
        self.add_argument(
            "--resume",
            nargs="?",
            const="auto",
            metavar="CHECKPOINT",
            help="go on with the run in the folder `out`: from its last checkpoint (auto), or from "
            "the folder of one",
        )

    def parse(self, arguments: list[str], cls: type) -> tuple[argparse.Namespace, Flags]:
        """Return the command's own options, and the settings among the arguments.

        Args:
            arguments: What stands after the command.
            cls: The dataclass whose settings the help shows.
        """
        if {"-h", "--help"} & set(arguments):
            self.print_help()
            print(_settings_help(cls), end="")
            self.exit()
        others, flags = self._split(arguments, cls)
        return self.parse_args(others), flags

    def _split(self, arguments: list[str], cls: type) -> tuple[list[str], Flags]:
        """Take the settings out of the arguments: all flags but the command's own options."""
        own = list(self._option_string_actions)
        names = {field.name for kind in (cls, settings.ClassifierRecipe) for field in fields(kind)}
        others, flags = list[str](), Flags()
        waiting = list(arguments)
        while waiting:
            argument = waiting.pop(0)
            flag, equals, value = argument.partition("=")
            dashed = flag.replace("_", "-")
            if not flag.startswith("--") or dashed in own:
                others.append(dashed + equals + value if flag.startswith("--") else argument)
                continue
            path = flag[2:].replace("-", "_")
            if path not in names and closest(dashed, own):
                self.error(f"unknown argument {flag!r}.{closest(dashed, own)}")
            if not equals:
                bare = not waiting or waiting[0].startswith("--")
                if _is_truth(cls, path) and (bare or waiting[0].lower() not in TRUTHS):
                    value = "true"
                elif bare:
                    self.error(f"argument {flag}: expected a value after it.")
                else:
                    value = waiting.pop(0)
            flags.append((path, value))
        return others, flags

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        dashed = [_with_dashes(argument) for argument in args]
        options, unknown = self.parse_known_args(dashed, namespace)
        if unknown:
            hint = closest(unknown[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}.{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        for action in self._actions:  # say what the word in capitals stands for
            if message == f"the following arguments are required: {action.metavar}":
                message = f"{action.metavar} must be given: {action.help}"
        end = "" if message.endswith((".", "?")) else "."
        if _is_main_process():
            print(f"{self.prog}: {message}{end} See `{self.prog} --help`.", file=sys.stderr)
        self.exit(USAGE_ERROR)


TRUTHS = ("true", "false", "yes", "no", "on", "off")


def _with_dashes(argument: str) -> str:
    """Turn the underscores in the name of an option into dashes: both spellings are the same."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _is_truth(cls: type, path: str) -> bool:
    """Tell whether a setting is true or false, so that its flag may stand alone."""
    found = (*settings.paths(cls), *settings.paths(settings.ClassifierRecipe))
    return any(setting.is_truth for setting in found if setting.path == path)


def _settings_help(cls: type) -> str:
    """Return every setting with its flag, default and text."""
    width = min(100, max(60, int(os.environ.get("COLUMNS", 100))))
    lines = [
        "",
        "settings, as lines of a recipe or as flags: ppo: {gamma: 0.99} or --ppo.gamma 0.99",
        "",
        "  Flags go over the recipe, later ones over earlier ones. One that is true or false may",
        "  stand alone. Lists and sections are written as YAML: --tracking.to '[wandb]',",
        "  --model.lora '{rank: 8}'; null is none: --model.lora none. N is a number from 0.",
    ]
    sections: dict[str, list[str]] = {}
    for setting in settings.paths(cls):
        above, _, _ = setting.path.rpartition(".")
        sections.setdefault(above, []).extend(_setting_help(setting, width))
    for name, texts in sections.items():
        lines += ["", f"{name or 'the run'}:", *texts]
    return "\n".join(lines) + "\n"


def _setting_help(setting: Setting, width: int) -> list[str]:
    flag = f"--{setting.path.replace('_', '-')}"
    text = " ".join(f"{setting.text} ({setting.kind}; default: {setting.default})".split())
    body = textwrap.wrap(text, width - 6, break_on_hyphens=False)
    return [f"  {flag}", *(f"      {line}" for line in body)]


# -- errors --------------------------------------------------------------------------------------


def _is_main_process() -> bool:
    """Tell whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _complain(text: str) -> None:
    if _is_main_process():
        print(text, file=sys.stderr)


def _told(error: SettingsError) -> str:
    """Return everything wrong with the settings, a line for each problem."""
    if len(error.found) == 1:
        return f"trl: {error.owner}: {error.found[0]}"
    problems = "".join(f"\n  {problem}" for problem in error.found)
    return f"trl: {error.owner} has {len(error.found)} problems:{problems}"


def _sentence(error: Exception) -> str:
    """Return what an error says, without the number of the system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return str(error)


def _is_explained(error: Exception) -> bool:
    """Tell an error that trl raised on purpose, or the system's (a file, a disk), from a bug.

    What comes out of another library's code keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False  # of an import, not of a sentence on what to install
    if not isinstance(error, (ArithmeticError, ImportError, RuntimeError, TypeError, ValueError)):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return Path(innermost.filename).is_relative_to(Path(trl.__file__).parent)
