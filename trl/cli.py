"""The command `trl`.

    trl train RECIPE         run a recipe: a YAML file, or the name of one that ships with trl
    trl demo                 tune a small GPT-2 to write positive film reviews
    trl reward PREFERENCES   train a reward model on what people preferred
    trl sample MODEL         let a policy, or the policy of a run, write
    trl chat MODEL           talk to a model, or to a run's before and after, side by side
    trl score TEXTS          score texts as a recipe does
    trl report RUN ...       write the report of a run, or of several side by side
    trl compare RUN ...      show how runs ended and what they did differently
    trl label --from RUN     let people judge responses, on a page of this machine

    trl COMMAND --help       its options and settings
    trl --version

Every setting of a recipe is a flag: `ppo.learning_rate` there is `--ppo.learning-rate` here, and
the text under the field of the dataclass is its help. Neither torch nor transformers is imported
before all settings are known to be good.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import trl
from trl import config as settings
from trl.config import SettingsError, closest
from trl.config.code import UNISOLATED, Reader, listing
from trl.config.errors import hidden, problem
from trl.config.folder import recipe_folder
from trl.config.places import not_a_model
from trl.evaluation.people.options import LABEL
from trl.watch.markdown import visible

if TYPE_CHECKING:  # making these classes takes longer than showing what commands there are
    from trl.config.recipe import Recipe, RewardConfig, SupervisedRecipe

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
        notes = getattr(error, "__notes__", [])
        told = "\n".join([f"trl: {_sentence(error)}", *notes])
        print(hidden(visible(told)), file=sys.stderr)
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
        return COMMANDS[command].run(*_Parser(command).parse(others))
    else:
        _complain(
            f"trl: unknown command {command!r}.{closest(command, COMMANDS)} See `trl --help`."
        )
        return USAGE_ERROR
    return 0


# -- the commands --------------------------------------------------------------------------------


def _train(options: argparse.Namespace, flags: Flags) -> int:
    """Run a recipe, or print it."""
    recipe = read_recipe(options.recipe, flags, options.trust)
    _check_resume(recipe, options.resume)
    resume = options.resume
    if options.resume_changed:
        resume = f"changed:{resume or 'auto'}"
    if options.print_config:
        if _is_main_process():
            print(settings.dump(recipe, texts=True), end="")
        return 0
    if isinstance(recipe, settings.SupervisedRecipe):
        return _fit(recipe, options.resume)
    _list_code(recipe.reward, recipe.model.name if recipe.model.trust_remote_code else None)
    from trl.training.run import run_recipe

    result = run_recipe(recipe, resume=resume, trust=options.trust)
    return INTERRUPTED if getattr(result, "interrupted", False) else 0


def _fit(recipe: SupervisedRecipe, resume: str | None) -> int:
    """Train a classifier or a reward model."""
    if isinstance(recipe, settings.RewardRecipe):
        from trl.training.reward import train_reward  # torch and transformers: seconds

        train_reward(recipe, resume=resume is not None)
    elif isinstance(recipe, settings.ClassifierRecipe):
        from trl.training.classifier import train_classifier

        train_classifier(recipe, resume=resume is not None)
    return 0


def _reward(options: argparse.Namespace, flags: Flags) -> int:
    train = {"train": options.preferences}
    recipe = settings.build(settings.RewardRecipe, train, flags=flags)
    _check_models(recipe, Path(options.preferences))
    _check_resume(recipe, options.resume)
    if options.print_config:
        print(settings.dump(recipe, texts=True), end="")
        return 0
    return _fit(recipe, options.resume)


def _demo(options: argparse.Namespace, flags: Flags) -> int:
    options.recipe = "sentiment"
    return _train(options, [("out", "runs/demo"), *flags])


def _sample(options: argparse.Namespace, flags: Flags) -> int:
    _check_beside_runs(options.model)
    from trl.training import tools

    given = vars(options)
    source, prompts, out = given.pop("prompts"), given.pop("prompt"), given.pop("out")
    prompts = tools.read_prompts(source) if source else prompts
    tools.show(tools.sample(prompts=prompts, **given), out)
    return 0


def _chat(options: argparse.Namespace, flags: Flags) -> int:
    for name in filter(None, (options.model, options.before)):
        _check_beside_runs(name)
    from trl.training.chat import talk

    talk(**vars(options))
    return 0


def _score(options: argparse.Namespace, flags: Flags) -> int:
    path = options.recipe and find_recipe(options.recipe)
    every = settings.read_yaml(path) if path else {}
    values = {"reward": every["reward"]} if "reward" in every else {}
    owner = str(path) if path else None
    rewards = settings.build(settings.Scoring, values, flags=flags, owner=owner).reward
    rewards = _with_code(rewards, path or None, flags, options.trust)
    _list_code(rewards)
    if options.validate is not None:
        from trl.training.validation import validate

        return validate(options.texts, rewards, options.validate, options.trust)
    from trl.training import tools

    texts, columns = tools.read_texts(options.texts)
    form = tools.form_of(every, path) if path and "task" not in every else None
    rows = tools.score_texts(texts, rewards, options.trust, columns=columns, form=form)
    tools.show(rows, options.out)
    return 0


def _report(options: argparse.Namespace, flags: Flags) -> int:
    runs = [_folder(run) for run in options.runs]
    from trl.report import write_report

    out = Path(options.out or runs[0]).expanduser()
    if len(runs) > 1 and out.suffix != ".html":
        out /= "compare.html"  # the page of the run itself stays
    print(write_report(runs, out))
    return 0


def _compare(options: argparse.Namespace, flags: Flags) -> int:
    runs = [_folder(run) for run in options.runs]
    from rich.console import Console

    from trl.report import compare

    Console().print(compare(runs))
    return 0


def _label(options: argparse.Namespace, flags: Flags) -> int:
    from trl.training.label import label

    return label(options)


@dataclass(frozen=True)
class Command:
    """A command of `trl`."""

    run: Callable[[argparse.Namespace, Flags], int]
    """Gets its options, and the settings among its arguments; returns the exit code."""
    about: str
    options: Mapping[str, Mapping[str, Any]]
    """What `argparse` is told of each."""
    settings: Callable[[list[str]], type] | None = None
    """Which dataclass's settings are flags, by the arguments; None: there are none."""


def _word(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": text} | more


def _number(default: float, text: str, shown: str = "%(default)s") -> dict[str, Any]:
    return _word("N", f"{text} (default: {shown})", type=type(default), default=default)


TRUST = {
    "--trust": _word(
        "MODULE",
        "run the functions of this module, package or file too; each by a --trust of its own",
        action="append",
        default=[],
    ),
    UNISOLATED: {
        "dest": "trust",
        "action": "append_const",
        "const": UNISOLATED,
        "help": "run the code of answers (kind: code) though the system cannot shut it in",
    },
}
RUN_OPTIONS = {
    "--print-config": {"action": "store_true", "help": "check and print the settings, no more"},
    "--resume": _word(
        "CHECKPOINT",
        "go on with the run in the folder `out`: from its last checkpoint (auto), or from the "
        "folder of one",
        nargs="?",
        const="auto",
    ),
    "--resume-changed": {
        "action": "store_true",
        "help": "go on though settings, model, prompts or rewards are others than before",
    },
    **TRUST,
}
RUNS = {"runs": _word("RUN", "the folder of a run", nargs="+")}
LINES = {"--out": _word("FILE", "write lines of JSON there; -: to the screen")}
RECIPE = _word("RECIPE", "a YAML file, the folder of a run, or the name of a recipe")
SENT = {
    "--system": _word("TEXT", "the system message; default: that of the run"),
    "--chat-template-kwargs": _word(
        "JSON", "what the chat template is told: '{\"enable_thinking\": false}'", type=json.loads
    ),
}
DRAWN = {
    "--temperature": _number(1.0, "divides the logits", "1"),
    "--top-k": _number(0, "among the k likeliest tokens", "all"),
    "--top-p": _number(1.0, "among those of this share", "all"),
    "--seed": _number(0, "of the random numbers"),
}
COMMANDS = {
    "train": Command(
        _train,
        "Run a recipe. Those that ship with trl: {recipes}.",
        {"recipe": RECIPE} | RUN_OPTIONS,
        lambda arguments: _kind_of(arguments),
    ),
    "demo": Command(
        _demo,
        "Tune a small GPT-2 to write positive film reviews, and show what changed: "
        "`trl train sentiment --out runs/demo`.",
        RUN_OPTIONS,
        lambda arguments: settings.Recipe,
    ),
    "reward": Command(
        _reward,
        "Train a reward model on what people preferred, to score responses with.",
        {"preferences": _word("PREFERENCES", "rows of prompt, chosen and rejected, or of votes")}
        | {name: RUN_OPTIONS[name] for name in ("--print-config", "--resume")},
        lambda arguments: settings.RewardRecipe,
    ),
    "sample": Command(
        _sample,
        "Let a policy write: a model's folder or hub name, or the folder of a run.",
        {
            "model": _word("MODEL", "a folder, a hub name, or starter"),
            "--prompt": _word("TEXT", "what to go on from", nargs="+"),
            "--prompts": _word("FILE", "one prompt a line, or a table with a column of them"),
            "--chat": {
                "action": argparse.BooleanOptionalAction,
                "help": "send texts as chats, or not; default: as in the run, else if the model "
                "has a chat template",
            },
            **SENT,
            "--n": _number(1, "responses to each prompt"),
            "--max-new-tokens": _number(48, "most tokens"),
            **DRAWN,
            **LINES,
        },
    ),
    "chat": Command(
        _chat,
        "Talk to a model; to the policy of a run and to the model that it began as, side by side. "
        "A message a line, from the terminal or a pipe; /clear begins anew, Ctrl-D ends.",
        {
            "model": _word("MODEL", "a folder, a hub name, starter, or the folder of a run"),
            "--before": _word("BASE", "a model that gets the same messages"),
            **SENT,
            "--max-new-tokens": _number(256, "most tokens of an answer"),
            **DRAWN,
            **LINES,
        },
    ),
    "score": Command(
        _score,
        "Score texts by the rewards of a recipe; without one, by the sentiment classifier that "
        "ships with trl.",
        {
            "texts": _word(
                "TEXTS",
                "a file with one text a line; a table with a column text, prompt (or query) and "
                "response (or completion), or messages; -: lines of the standard input",
            ),
            "--recipe": RECIPE,
            "--validate": _word(
                "COLUMN",
                "check the rewards: right answers of the table TEXTS, in COLUMN or made of what a "
                "reward compares with, must score 1, and those of other rows 0",
                nargs="?",
                const="",
            ),
            **TRUST,
            **LINES,
        },
        lambda arguments: settings.Scoring,
    ),
    "report": Command(
        _report,
        "Write the report of a run, or of several side by side: one HTML file.",
        RUNS
        | {
            "--out": _word(
                "FOLDER",
                "where report.html goes, or compare.html if there are several runs, or the name of "
                "that file; default: the folder of the first run",
            )
        },
    ),
    "compare": Command(
        _compare, "Show how runs ended on the held-out prompts, and which settings differ.", RUNS
    ),
    "label": Command(
        _label,
        "Let people judge responses, on a page of this machine: of a run, before and after it; of "
        "two runs against each other; of models; or those of a file. No answer is ever lost.",
        LABEL,
    ),
}
EITHER = ("--prompt", "--prompts")
"""Options that do not go together."""


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
    for found in (path, path / "recipe.yaml", recipe_folder() / f"{name}.yaml"):
        if found.is_file():
            return found
    beside = [str(each) for each in path.parent.glob("*.y*ml")]
    raise FileNotFoundError(
        f"There is no recipe {name!r}, neither a file nor one that ships with trl "
        f"({', '.join(recipe_names()) or 'none do'}).{closest(name, [*recipe_names(), *beside])}"
    )


def read_recipe(
    name: str, flags: Sequence[tuple[str, str]] = (), trust: Sequence[str] = ()
) -> Recipe | SupervisedRecipe:
    """Return a recipe with flags over what its file says.

    Args:
        name: See `find_recipe`.
        flags: Paths, as `ppo.learning-rate`, and what is written for them.
        trust: Modules and files whose code may run, besides files beside the recipe.

    Raises:
        FileNotFoundError: if there is no such recipe.
        SettingsError: with everything that is wrong.
    """
    from trl.data.sources import beside_recipe

    path = find_recipe(name)
    values = settings.read_yaml(path)
    task = dict(flags).get("task", values.get("task"))
    cls = _kind(task)
    recipe = settings.build(cls, values, flags=flags, owner=str(path))
    _check_models(recipe, path)
    if task is not None:
        return recipe  # type: ignore[no-any-return]
    if "out" not in dict(flags) and (path.parent / "metrics.jsonl").is_file():
        recipe = replace(recipe, out=str(path.parent))  # a run goes on where it is now
    files = {
        name: beside_recipe(getattr(recipe.data, name), path.parent)
        for name in ("prompts", "held_out_prompts")
    }
    _check_model_code(recipe, path, list(flags))
    rewards = _with_code(recipe.reward, path, list(flags), trust)
    return replace(recipe, data=replace(recipe.data, **files), reward=rewards)  # type: ignore[no-any-return]


def _with_code(
    rewards: tuple[RewardConfig, ...], recipe: Path | None, flags: Flags, trust: Sequence[str]
) -> tuple[RewardConfig, ...]:
    """Write out the paths of the Python files of functions.

    Raises:
        SettingsError: for code that is not there, or that nobody but the recipe has named.
    """
    folder = Path.cwd() if recipe is None else recipe.parent
    reader = Reader(folder, recipe_folder(), trust, " ".join(text for _, text in flags))
    rewards, problems = reader.with_files(rewards)
    if problems:
        raise SettingsError("Scoring" if recipe is None else str(recipe), problems)
    return rewards


def _check_model_code(recipe: Recipe, path: Path, flags: Flags) -> None:
    """Raise if the code of a model would run by the word of the recipe alone."""
    named = any("trust_remote_code" in name + text.replace("-", "_") for name, text in flags)
    if recipe.model.trust_remote_code and not named:
        rule, flag = "be a word of who reads the recipe too", "--model.trust-remote-code"
        fix = f"look at the code of {recipe.model.name}, and add {flag} to run it"
        raise SettingsError(str(path), [problem("model.trust_remote_code", rule, "true", fix)])


def _check_models(recipe: Recipe | SupervisedRecipe, path: Path) -> None:
    """Raise for models that are nowhere, before the seconds that it takes to load anything."""
    if isinstance(recipe, settings.SupervisedRecipe):
        names = {"model": recipe.model}
    else:
        names = {"model.name": recipe.model.name, "model.tokenizer": recipe.model.tokenizer or ""}
        names |= {
            f"reward[{index}].name": reward.name
            for index, reward in enumerate(recipe.reward)
            if reward.kind not in ("function", "endpoint")
        }
    rule = "be the folder of a model, or its name on the Hugging Face Hub"
    problems = [
        problem(setting, rule, f"{name!r}, which {told}")
        for setting, name in names.items()
        if name and (told := not_a_model(name))
    ]
    if problems:
        raise SettingsError(str(path), problems)


def _list_code(rewards: Sequence[RewardConfig], model: str | None = None) -> None:
    """Name the code that is about to run: no recipe can be so quiet that it is not."""
    for line in listing(rewards, model):
        _complain(f"trl: {line}.")


def _kind_of(arguments: list[str]) -> type:
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


def _check_resume(recipe: Recipe | SupervisedRecipe, resume: str | None) -> None:
    """Raise if the run cannot be gone on with, as far as that is seen in a moment."""
    if resume is None:
        return
    if isinstance(recipe, settings.SupervisedRecipe) and resume != "auto":
        raise ValueError(f"--resume must stand alone for a {recipe.task}, got {resume!r}.")
    if resume != "auto" and not Path(resume).expanduser().is_dir():
        hint = closest(resume, map(str, Path(recipe.out).expanduser().glob("checkpoints/*")))
        raise FileNotFoundError(
            f"--resume must be auto or the folder of a checkpoint, got {resume!r}.{hint}"
        )


def _folder(name: str) -> Path:
    """Return the folder of a run."""
    path = Path(name).expanduser()
    if not path.is_dir():
        hint = closest(str(path), map(str, filter(Path.is_dir, path.parent.glob("*"))))
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

    def __init__(self, name: str) -> None:
        command = COMMANDS[name]
        super().__init__(
            prog=f"trl {name}",
            description=command.about.format(recipes=", ".join(recipe_names())),
            allow_abbrev=False,
        )
        self.settings = command.settings
        has_both = set(EITHER) <= set(command.options)
        either = self.add_mutually_exclusive_group() if has_both else self
        for option, told in command.options.items():
            (either if option in EITHER else self).add_argument(option, **told)
        if self.settings:
            self.usage = f"{self.format_usage().removeprefix('usage: ').rstrip()} [SETTING ...]"

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, Flags]:
        """Return the command's own options, and the settings among what stands after it."""
        arguments = [_with_dashes(argument) for argument in arguments]
        cls = self.settings and self.settings(arguments)
        if cls and {"-h", "--help"} & set(arguments):
            self.print_help()
            print(_settings_help(cls), end="")
            self.exit()
        others, flags = self._split(arguments, cls) if cls else (arguments, [])
        options, unknown = self.parse_known_args(others)
        if unknown:
            hint = closest(unknown[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}.{hint}")
        return options, flags

    def _split(self, arguments: list[str], cls: type) -> tuple[list[str], Flags]:
        """Take the settings out of the arguments: all flags but the command's own options."""
        own = list(self._option_string_actions)
        kinds = (cls, settings.ClassifierRecipe)
        names = {field.name for kind in kinds for field in fields(kind)}
        # True or false, so that their flags may stand alone.
        truths = {each.path for kind in kinds for each in settings.paths(kind) if each.is_truth}
        others, flags, waiting = list[str](), Flags(), list(arguments)
        while waiting:
            argument = waiting.pop(0)
            flag, equals, value = argument.partition("=")
            if not flag.startswith("--") or flag in own:
                others.append(argument)
                continue
            path = flag[2:].replace("-", "_")
            if path not in names and closest(flag, own):
                self.error(f"unknown argument {flag!r}.{closest(flag, own)}")
            bare = not waiting or waiting[0].startswith("--")
            if not equals and path in truths and (bare or waiting[0].lower() not in TRUTHS):
                value = "true"
            elif not equals and bare:
                self.error(f"argument {flag}: expected a value after it.")
            elif not equals:
                value = waiting.pop(0)
            flags.append((path, value))
        return others, flags

    def error(self, message: str) -> NoReturn:
        for action in self._actions:  # say what the word in capitals stands for
            if message == f"the following arguments are required: {action.metavar}":
                message = f"{action.metavar} must be given: {action.help}"
        end = "" if message.endswith((".", "?")) else "."
        _complain(f"{self.prog}: {message}{end} See `{self.prog} --help`.")
        self.exit(USAGE_ERROR)


TRUTHS = ("true", "false", "yes", "no", "on", "off")


def _with_dashes(argument: str) -> str:
    """Turn the underscores in the name of an option into dashes: both spellings are the same."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


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
        text = " ".join(f"{setting.text} ({setting.kind}; default: {setting.default})".split())
        body = textwrap.wrap(text, width - 6, break_on_hyphens=False)
        flag = f"  --{setting.path.replace('_', '-')}"
        sections.setdefault(above, []).extend([flag, *(f"      {line}" for line in body)])
    for name, texts in sections.items():
        lines += ["", f"{name or 'the run'}:", *texts]
    return "\n".join(lines) + "\n"


# -- errors --------------------------------------------------------------------------------------


def _is_main_process() -> bool:
    """Tell whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _complain(text: str) -> None:
    if _is_main_process():
        print(hidden(visible(text)), file=sys.stderr)


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
