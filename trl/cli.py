"""The command `trl`.

    trl demo                                   tune the starter GPT-2 to write positive film reviews
    trl demo --steps 20 --ppo.init-kl-coef 0.3
    trl --version

The flags are the fields of the configuration dataclasses: `ppo.learning_rate` there is
`--ppo.learning-rate` here, and the text under a field is its help. Neither torch nor transformers
is imported before the flags are known to be good.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import trl
from trl.config import DemoConfig, closest

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 if all went well, 1 if the run could not go on, 2 for a user's error, 130 for Ctrl-C.
    """
    parser = _parser()
    try:
        options = parser.parse_args(_with_dashes(sys.argv[1:] if arguments is None else arguments))
        if options.command is None:
            parser.print_help()
            return 0
        _demo(options)
    except KeyboardInterrupt:
        print("\ntrl: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _is_explained(error):
            raise
        print(f"trl: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, (OSError, TypeError, ValueError)) else FAILED
    return 0


def _demo(options: argparse.Namespace) -> None:
    config = _configured(DemoConfig(), vars(options))
    from trl.training.demo import run_demo  # imports torch and transformers: seconds

    run_demo(config)


def _parser() -> _Parser:
    parser = _Parser(prog="trl", description="Train transformer language models with PPO.")
    parser.add_argument("--version", action="version", version=f"trl {trl.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    demo = commands.add_parser(
        "demo",
        usage="trl demo [SETTING ...]",
        help="tune a small GPT-2 to write positive film reviews, and show what changed",
        description="Tune a small GPT-2 to write positive film reviews, and show what changed.",
    )
    _add_flags(demo, DemoConfig())
    return parser


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and names the flag closest to an unknown one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}.{closest(unknown[0], self._flags())}")
        return options

    def _flags(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices
                for parser in action.choices.values():
                    yield from parser._flags()

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} See `{self.prog} --help`.\n")


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """Turn the underscores in the names of flags into dashes: both spellings are the same flag."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(
            name.replace("_", "-") + equals + value if name.startswith("--") else argument
        )
    return spelled


def _add_flags(parser: argparse.ArgumentParser, defaults: Any, prefix: str = "") -> None:
    """Add a flag for each field of the dataclass instance `defaults`, and of those inside it."""
    kinds = typing.get_type_hints(type(defaults))
    helps = _texts_under_fields(type(defaults))
    group = parser.add_argument_group(f"{prefix}*" if prefix else "settings")
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        if is_dataclass(default):
            _add_flags(parser, default, prefix=f"{prefix}{field.name}.")
            continue
        parse, metavar = _parse_and_metavar(kinds[field.name])
        group.add_argument(
            f"--{prefix}{field.name}".replace("_", "-"),
            dest=f"{prefix}{field.name}",
            type=parse,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=f"{helps.get(field.name, '')} (default: {default})".replace("%", "%%"),
        )


def _configured(defaults: Any, given: dict[str, Any], prefix: str = "") -> Any:
    """Return the dataclass instance `defaults` with the given values in place of its own."""
    changes = {}
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        path = f"{prefix}{field.name}"
        if is_dataclass(default):
            changes[field.name] = _configured(default, given, prefix=f"{path}.")
        elif path in given:
            changes[field.name] = given[path]
    return replace(defaults, **changes)


def _texts_under_fields(cls: type) -> dict[str, str]:
    """Return the string literal that follows each annotated field in the source of a class."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for entry, below in itertools.pairwise(definition.body):
        if (
            isinstance(entry, ast.AnnAssign)
            and isinstance(entry.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[entry.target.id] = inspect.cleandoc(str(below.value.value))
    return texts


def _parse_and_metavar(kind: Any) -> tuple[Callable[[str], Any], str]:
    """Return how to read a value of the annotated type, and how the help calls such a value."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return _one_of(choices), "{" + ",".join(map(str, choices)) + "}"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        assert len(inner) == 1, f"no flag can be made for {kind}"
        parse, metavar = _parse_and_metavar(inner[0])
        return _optional(parse), metavar
    return {
        bool: (_true_or_false, "{true,false}"),
        int: (_whole_number, "N"),
        float: (_number, "X"),
        str: (str, "TEXT"),
    }[kind]


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            hint = closest(text, choices)
            raise argparse.ArgumentTypeError(f"must be one of {list(choices)}, got {text!r}.{hint}")
        return text

    return parse


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}.")
    return text.lower() == "true"


def _whole_number(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}.") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}.") from None


def _is_explained(error: Exception) -> bool:
    """Tell an error that trl raised on purpose, or the system's (a file, a disk), from a bug.

    What comes out of another library's code keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ArithmeticError, RuntimeError, TypeError, ValueError)):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return Path(innermost.filename).is_relative_to(Path(trl.__file__).parent)
