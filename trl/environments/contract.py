"""What a user writes: a class of environments, or tools; and how it is recognised.

    class Maze:
        def reset(self, size: int = 4, **row) -> str | None:
            '''Begin an episode. What it returns is appended to the prompt, or is the prompt.'''
        def move(self, direction: Literal["north", "east", "south", "west"]) -> str:
            '''A public method is a tool: its types and Google docstring tell a model of it.'''
        def get_reward(self) -> float:
            '''Optional: how well the episode went.'''

This is the contract of TRL's `environment_factory`: its classes work as they are. The plain form,
for games and simulators, has no tools but a method that is annotated with `Turn`:

        def step(self, text: str) -> Turn:
            '''Answer what the policy wrote in a turn.'''
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from types import FunctionType
from typing import Any, NoReturn, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    TypeHintParsingException,
    parse_google_format_docstring,
)

from trl.config.errors import refuse, shown
from trl.evaluation.scores import described

__all__ = ["EpisodeError", "Reply", "Turn", "tool"]

RESERVED = {"reset", "get_reward", "close"}
"""Public methods that are no tools."""

VARIABLE = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD, Parameter.POSITIONAL_ONLY}
"""Parameters that cannot be given by a name of their own."""

ROUTE = "environment"
"""The column that names the environment of a row, where there are several."""

Function = TypeVar("Function", bound=Callable[..., Any])


class EpisodeError(RuntimeError):
    """An environment broke its contract: what it is, what it should have done, and what to do."""


class Words(Exception):
    """What went wrong, as the model is told."""


@dataclass(frozen=True)
class Turn:
    """What `step(text) -> Turn` of the plain form returns."""

    observation: str | None = None
    """What the policy is told; None: nothing, and the episode is over."""
    reward: float = 0.0
    """Of the turn that the policy wrote; it stands at the last token of it."""
    done: bool = False
    """Whether the episode is over."""


@dataclass(frozen=True)
class Reply:
    """What a row's environment says to one turn of the policy."""

    messages: tuple[dict[str, Any], ...] = ()
    """To be appended: one of the role `tool` for each call, or one of the `user`; none: the policy
    has not been asked for more."""
    reward: float = 0.0
    """Of this turn."""
    done: bool = False
    """Whether the episode is over."""
    calls: int = 0
    """Tool calls of this turn."""
    failed: int = 0
    """Calls, or a `step`, that were answered with an error in words."""


def tool(
    function: Function | None = None,
    *,
    process: bool = False,
    serial: bool = False,
    seconds: float | None = None,
) -> Any:
    """Say how a tool, or another method of an environment, is to be run.

        @tool(process=True, seconds=2)
        def run(code: str) -> str: ...

    Args:
        function: Of which it is said; None: return a decorator. Any function or method may also
            have these three as attributes.
        process: In a child process, which is killed when its time is over; a thread cannot be. The
            child is a copy: what it changes in the environment is lost, and it may do all that
            this process may, but torch may hang in it. It has random states of its own, as with
            `serial`. No Windows.
        serial: One after another, with Python's and NumPy's global random states swapped in and
            out: for what draws from these. Each row has states of its own, from the seed of its
            `reset`, so that what is drawn depends on no other row.
        seconds: How long it may take. Default: as for all tools.
    """
    if seconds is not None and not seconds > 0:
        refuse("seconds", "be > 0", seconds)

    def mark(function: Function) -> Function:
        for name, value in {"process": process, "serial": serial, "seconds": seconds}.items():
            setattr(function, name, value)
        return function

    return mark if function is None else mark(function)


# -- tools -----------------------------------------------------------------------------------------


class Tool:
    """A tool: what a model is told of it, and what it takes.

    Args:
        function: Or a bound method, with a type for each parameter.
        name: Of it in errors: "Maze.move".

    Raises:
        TypeError: if it is no function, or has parameters without types, or such as no JSON has.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        if not inspect.isroutine(function):
            refuse("tools", "be functions", shown(function), error=TypeError)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            refuse(name, "return what it has to say, at once", "a function that yields")
        self.name, self.function = function.__name__, function
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            fix = "import them where the tool is, at the top and not for type checkers alone"
            refuse(name, "have types that are there", str(error), fix, error=TypeError)
        untyped = [each.name for each in parameters if each.name not in hints]
        unnamed = [str(each) for each in parameters if each.kind in VARIABLE]
        if untyped or unnamed:
            rule = "have parameters with names and types"
            fix = f"write such as {(untyped or ['query'])[0]}: str"
            if self.name == "step":
                fix += ", or for the plain form def step(self, text: str) -> Turn"
            refuse(name, rule, f"{', '.join(untyped or unnamed)}", fix, error=TypeError)
        self.schema = _schema(function, name, signature, hints)
        self._told = f"{self.name}{signature.replace(return_annotation=Parameter.empty)}"
        self._needs = {each.name for each in parameters if each.default is Parameter.empty}
        self._kinds = {each.name: _kind(hints[each.name]) for each in parameters}

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments as its parameters have them: "3" is 3 where an integer is asked for.

        Raises:
            Words: if they do not fit.
        """
        read, wrong = dict[str, Any](), [f"{key} is missing" for key in self._needs - {*arguments}]
        for key, value in arguments.items():
            try:
                read[key] = self._kinds[key].validate_python(value)
            except KeyError:
                wrong.append(f"there is no {key}")
            except ValidationError as error:
                told = error.errors()[0]["msg"].removeprefix("Input ").partition(",")[0]
                wrong.append(f"{key} {told}, got {shown(value)}")
        if wrong:
            raise Words(f"{self._told} got arguments that do not fit: {'; '.join(sorted(wrong))}.")
        return read


def _kind(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))


def _schema(
    function: Callable[..., Any], name: str, signature: inspect.Signature, hints: dict[str, Any]
) -> dict[str, Any]:
    """Return the JSON schema of a tool; a docstring that leaves out something is told once."""
    main, described, returned = parse_google_format_docstring(inspect.getdoc(function) or "")
    described = described or {}
    missing = [each for each in signature.parameters if each not in described]
    if not main or missing:
        what = f"the parameters {missing}" if main else "what it is for"
        warnings.warn(
            f"The docstring of {name} does not tell {what}: the model sees names and types alone. "
            "Write a line on it, and below `Args:` one for each parameter, `name: description`.",
            stacklevel=2,
        )
    lines = [f"    {each}: {described.get(each) or each}" for each in signature.parameters]

    def stand_in() -> None: ...

    stand_in.__name__, stand_in.__annotations__ = function.__name__, hints
    stand_in.__signature__ = signature  # type: ignore[attr-defined]
    parts = [main or function.__name__, "Args:", *lines, "", "Returns:", f"    {returned or ''}"]
    stand_in.__doc__ = "\n".join(parts if returned else parts[:-2])
    try:
        return get_json_schema(stand_in)
    except TypeHintParsingException as error:
        fix = "use str, int, float, bool, list, dict, Literal or Enum"
        refuse(name, "have types that JSON has", " ".join(map(str, error.args)), fix)


# -- environments ----------------------------------------------------------------------------------


class Kind:
    """A kind of environments: what makes them, which form they have, what their `reset` takes.

    Args:
        factory: A class or function that is called without arguments; None: there is no
            environment, only tools.
        tools: Functions that are tools beside the environment's.
        name: Of the parameter, in errors.

    Raises:
        TypeError, ValueError: if what it makes has not the form of an environment.
    """

    def __init__(
        self, factory: Callable[[], Any] | None, tools: Sequence[Callable[..., Any]], name: str
    ) -> None:
        self.name, self._factory, self.plain = "tools", factory, False
        given = [Tool(function, getattr(function, "__name__", "tool")) for function in tools]
        self.first = None if factory is None else self._look(factory, name)
        own = [] if factory is None or self.plain else self._methods()
        if self.plain and tools:
            fix = "make them methods of a class without such a `step`, or leave them out"
            refuse("tools", f"be empty beside {self.name}.step(text) -> Turn", len(tools), fix)
        names = [each.name for each in own + given]
        if doubled := sorted({each for each in names if names.count(each) > 1}):
            refuse("tools", "have names of their own", f"{doubled} twice", "rename them")
        self.tools = dict(zip(names, own + given, strict=True))
        if not self.tools and not self.plain:
            rule = "have tools (public methods), or a method step(text) -> Turn"
            refuse(name, rule, self.name, "write `-> Turn` behind its step, or tools=[...]")
        self.own = set(names[: len(own)])
        self.schemas = [each.schema for each in self.tools.values()]
        takes = inspect.signature(self.first.reset).parameters if self.first is not None else {}
        self._takes_all = any(each.kind == Parameter.VAR_KEYWORD for each in takes.values())
        named = {key: each for key, each in takes.items() if each.kind not in VARIABLE}
        self._takes = set(named)
        self.needs = {key for key, each in named.items() if each.default is Parameter.empty}
        self.needs -= {"seed"}

    def _look(self, factory: Callable[[], Any], name: str) -> Any:
        """Return a first environment; what is wrong with it is told before anything runs."""
        if not callable(factory):
            fix = f"pass the class itself, {type(factory).__name__}, without calling it"
            refuse(name, "be a class or function that makes one", shown(factory), fix)
        self.name = getattr(factory, "__name__", type(factory).__name__)
        try:
            first = self.make()
        except TypeError as error:
            fix = f"give them beforehand: functools.partial({self.name}, ...)"
            rule = "be made by a call without arguments"
            refuse(name, rule, f"{self.name}() ({error})", fix, error=TypeError)
        except Exception as error:
            broken(name, f"make {self.name}()", described(error))
        self.name = type(first).__name__
        if not callable(getattr(first, "reset", None)):
            fix = "write def reset(self, **row): ..., which begins an episode"
            refuse(name, "have a method `reset`", self.name, fix, error=TypeError)
        step: Any = getattr(first, "step", None)
        self.plain = step is not None and _says_turn(step)
        if self.plain:
            try:
                inspect.signature(step).bind("")
            except TypeError:
                rule = "take the text of the policy and no more"
                refuse(f"{self.name}.step", rule, inspect.signature(step), error=TypeError)
        return first

    def make(self) -> Any:
        """Return a new environment; None: there are tools alone."""
        return self._factory and self._factory()

    def _methods(self) -> list[Tool]:
        """Return the public methods of its class that are tools."""
        kind, found = type(self.first), list[Tool]()
        for name in dir(kind):
            is_one = isinstance(
                inspect.getattr_static(kind, name), FunctionType | staticmethod | classmethod
            )
            if is_one and not name.startswith("_") and name not in RESERVED:
                found.append(Tool(getattr(self.first, name), f"{self.name}.{name}"))
        return found

    def function_of(self, name: str, environment: Any) -> Callable[..., Any]:
        """Return what a tool calls: a function, or the method of an environment."""
        return getattr(environment, name) if name in self.own else self.tools[name].function

    def given(self, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return what of a row `reset` accepts, and the seed if it takes one.

        Lists are copies: an environment may change what is its own, and the rows of a group have
        the same.
        """
        taken = {key: _own(row[key]) for key in row if self._takes_all or key in self._takes}
        return {"seed": seed, **taken} if "seed" in self._takes else taken


def _own(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def _says_turn(step: Callable[..., Any]) -> bool:
    """Tell whether the return annotation is `Turn`, as it is or as a text."""
    told = getattr(step, "__annotations__", {}).get("return")
    if isinstance(told, str):
        return told.strip("'\"").rpartition(".")[2] == Turn.__name__
    return isinstance(told, type) and issubclass(told, Turn)


# -- what comes back -------------------------------------------------------------------------------


def text_of(value: Any, most: int) -> str:
    """Return what a tool returns as a text: what is none as JSON, what is too long cut."""
    is_text = isinstance(value, str)
    text = value if is_text else json.dumps(value, ensure_ascii=False, default=_as_json)
    text = text.encode(errors="replace").decode()  # half a character has no tokens
    if len(text) <= most:
        return text
    note = f" … (cut: {len(text)} characters)"
    return (text[: max(0, most - len(note))] + note)[:most]


def _as_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)  # arrays and their numbers


def turn_of(value: Any, most: int) -> Any:
    """Return a `Turn` with its observation as a text; what is none as it is."""
    if not isinstance(value, Turn) or value.observation is None:
        return value
    return replace(value, observation=text_of(value.observation, most))


def number_of(value: Any, what: str) -> float:
    """Return a reward.

    Raises:
        EpisodeError: if it is no finite number.
    """
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        broken(what, "be a finite number", shown(value))
    return number


def prompt_of(value: Any, what: str) -> str | list[dict[str, Any]] | None:
    """Return what `reset` returned: a text, messages or None.

    Raises:
        EpisodeError: if it is something else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(map(_is_message, value)):
        return [
            {**each, "content": text_of(said, len(said))}
            if isinstance(said := each["content"], str)
            else dict(each)
            for each in value
        ]
    fix = "return what the policy is to see, or nothing"
    broken(what, "return a text, messages ({'role': …, 'content': …}) or None", shown(value), fix)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str | list)
    )


def broken(what: str, rule: str, got: object = "", fix: str = "") -> NoReturn:
    """Raise an `EpisodeError`."""
    refuse(what, rule, got, fix, error=EpisodeError)
