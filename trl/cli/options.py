"""The commands, their options, and how both are read and explained."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from trl import config as settings
from trl.cli.recipes import Flags, kind_of, recipe_names
from trl.cli.words import complain
from trl.config import closest
from trl.config.code import UNISOLATED
from trl.evaluation.people.options import LABEL

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A command of `trl`."""

    about: str
    options: Mapping[str, Mapping[str, Any]]
    """What `argparse` is told of each."""
    settings: Callable[[list[str]], type] | None = None
    """Which dataclass's settings are flags, by the arguments; None: there are none."""


def _word(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": text} | more


def _number(default: float, text: str, shown: str = "%(default)s") -> dict[str, Any]:
    return _word("N", f"{text} (default: {shown})", type=type(default), default=default)


def _most_tokens(default: str) -> dict[str, Any]:
    text = f"most tokens of a response (default: {default}; with an environment, of its recipe)"
    return _word("N", text, type=int)


def _numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


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
ENVIRONMENT = {
    "--recipe": RECIPE
    | {"help": f"{RECIPE['help']}, with an environment to talk with; default: that of the run"},
    "--environment": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "talk with the environment of the recipe, or let the model write alone",
    },
    "--trust": TRUST["--trust"],
}
COMMANDS = {
    "train": Command(
        "Run a recipe. Those that ship with trl: {recipes}.",
        {"recipe": RECIPE} | RUN_OPTIONS,
        lambda arguments: kind_of(arguments),
    ),
    "demo": Command(
        "Tune a small GPT-2 to write positive film reviews, and show what changed: "
        "`trl train sentiment --out runs/demo`.",
        RUN_OPTIONS,
        lambda arguments: settings.Recipe,
    ),
    "reward": Command(
        "Train a reward model on what people preferred, to score responses with.",
        {"preferences": _word("PREFERENCES", "rows of prompt, chosen and rejected, or of votes")}
        | {name: RUN_OPTIONS[name] for name in ("--print-config", "--resume")},
        lambda arguments: settings.RewardRecipe,
    ),
    "taste": Command(
        "Tune a model to what people choose among its responses, on a page of this machine: "
        "choices, a reward model of them, PPO by it, and again (`trl train human-preferences`).",
        {
            "model": _word("MODEL", "a folder, a hub name, or starter"),
            "prompts": _word("PROMPTS", "one prompt a line, a table with a column, or starter"),
        }
        | RUN_OPTIONS,
        lambda arguments: settings.PreferencesRecipe,
    ),
    "sample": Command(
        "Let a policy write: a model's folder or hub name, or the folder of a run.",
        {
            "model": _word("MODEL", "a folder, a hub name, starter, or the folder of a run"),
            "--prompt": _word("TEXT", "what to go on from", nargs="+"),
            "--prompts": _word("FILE", "one prompt a line, or a table with a column of them"),
            "--chat": {
                "action": argparse.BooleanOptionalAction,
                "help": "send texts as chats, or not; default: as in the run, else if the model "
                "has a chat template",
            },
            **SENT,
            "--n": _number(1, "responses to each prompt"),
            "--max-new-tokens": _most_tokens("48"),
            **DRAWN,
            **ENVIRONMENT,
            **LINES,
        },
    ),
    "chat": Command(
        "Talk to a model; to the policy of a run and to the model that it began as, side by side. "
        "A message a line, from the terminal or a pipe; /clear begins anew, Ctrl-D ends.",
        {
            "model": _word("MODEL", "a folder, a hub name, starter, or the folder of a run"),
            "--before": _word("BASE", "a model that gets the same messages"),
            **SENT,
            "--max-new-tokens": _most_tokens("as in the run, else 256, or half of what it reads"),
            **DRAWN,
            **ENVIRONMENT,
            **LINES,
        },
    ),
    "score": Command(
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
    "eval": Command(
        "Measure a policy on the held-out prompts of a recipe, by its reward and with its "
        "sampling: mean score, accuracy, pass@k, majority@k, each with an interval of 95 %.",
        {
            "model": _word("MODEL", "a folder, a hub name, starter, or the folder of a run"),
            "recipe": RECIPE | {"nargs": "?", "help": f"{RECIPE['help']}; default: that of MODEL"},
            "--samples": _number(8, "samples of each prompt"),
            "--k": _word("K,K", "for pass@k and majority@k; default: 1,2,4,…", type=_numbers),
            "--greedy": {"action": "store_true", "help": "the likeliest response to each as well"},
            "--prompts": _word("FILE", "these prompts, all of them, in place of the held-out ones"),
            "--right-from": _word(
                "REWARD",
                "a response is right from this reward on; default: if all that compares in the "
                "reward gives it 1, or if the reward is 1 where all are 0 or 1",
                type=float,
            ),
            "--out": _word("FOLDER", "write eval.json and eval_samples.jsonl there"),
            **TRUST,
        },
        lambda arguments: settings.Recipe,
    ),
    "report": Command(
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
        "Show how runs ended on the held-out prompts, and which settings differ.", RUNS
    ),
    "label": Command(
        "Let people judge responses, on a page of this machine: of a run, before and after it; of "
        "two runs against each other; of models; or those of a file. No answer is ever lost.",
        LABEL,
    ),
}
EITHER = ("--prompt", "--prompts")
"""Options that do not go together."""


class Parser(argparse.ArgumentParser):
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
        """Say what is wrong with the arguments, and end."""
        for action in self._actions:  # say what the word in capitals stands for
            if message == f"the following arguments are required: {action.metavar}":
                message = f"{action.metavar} must be given: {action.help}"
        end = "" if message.endswith((".", "?")) else "."
        complain(f"{self.prog}: {message}{end} See `{self.prog} --help`.")
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
