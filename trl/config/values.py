"""The types that settings may have, and values of them.

A type is that of an annotation: int, float, bool, str, Literal, tuple[X, ...], tuple[X, Y],
Mapping[X, Y], a dataclass, a tuple of dataclasses, each of them also `| None`.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, cast

NULLS = ("", "~", "null", "none")
"""What means None for a setting that may be None, in any case of letters."""
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
NUMBER = re.compile(
    r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?|[-+]?\.?inf|\.?nan",
    re.IGNORECASE,
)
LARGEST = 2**63
MISFIT: Any = object()
"""Stands for a value that is of another type than its setting."""


class Plain(str):
    """A word of YAML without quotes: a text, a number, a truth or None, as its setting wants it."""

    __slots__ = ()


# -- types ---------------------------------------------------------------------------------------


@functools.cache
def kinds_of(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def default_of(cls: Any, name: str) -> Any:
    """Return the default of a field, MISSING if it has none."""
    field: Field[Any] = cls.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def section_of(kind: Any) -> tuple[type | None, bool]:
    """Return the dataclass that a field holds, if it does, and whether it holds a list of them."""
    kind = without_none(kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and is_dataclass(arguments[0]):
        return cast(type, arguments[0]), True
    return (cast(type, kind) if is_dataclass(kind) else None), False


def is_optional(kind: Any) -> bool:
    """Tell whether a field may be None."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return union and type(None) in typing.get_args(kind)


def without_none(kind: Any) -> Any:
    """Return the type of a field when it is not None."""
    if not is_optional(kind):
        return kind
    inner = [part for part in typing.get_args(kind) if part is not type(None)]
    assert len(inner) == 1, f"no setting can be of the type {kind}"
    return inner[0]


def is_mapping(kind: Any) -> bool:
    """Tell whether a field holds a mapping of names that are no settings."""
    origin = typing.get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def described(kind: Any) -> str:
    """Return in words what values a type has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_optional(kind):
        return f"{described(without_none(kind))} or null"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    if is_mapping(kind):
        return f"a mapping from {_plural(arguments[0])} to {described(arguments[1])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(kind, "a section")


def _plural(kind: Any) -> str:
    words = {bool: "truths", int: "whole numbers", float: "numbers", str: "texts"}
    return words.get(kind, "sections")


# -- values --------------------------------------------------------------------------------------


def converted(kind: Any, value: Any) -> Any:
    """Return the value as the type wants it, MISFIT if it is of another type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_optional(kind):
        inner = without_none(kind)
        is_choice = typing.get_origin(inner) is Literal and value in typing.get_args(inner)
        return None if is_null(value) and not is_choice else converted(inner, value)
    if origin is Literal:
        found = str(value) if isinstance(value, str) else value
        return found if found in arguments else MISFIT
    if origin is tuple:
        return _converted_list(arguments, value)
    if is_mapping(kind):
        return _converted_mapping(arguments, value)
    convert: dict[Any, Callable[[Any], Any]] = {
        bool: _truth,
        int: _whole,
        float: _number,
        str: _text,
    }
    return convert[kind](value)


def _converted_list(kinds: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return MISFIT
    each = list(itertools.repeat(kinds[0], len(value)) if kinds[-1] is Ellipsis else kinds)
    if len(each) != len(value):
        return MISFIT
    found = tuple(converted(kind, entry) for kind, entry in zip(each, value, strict=True))
    return MISFIT if any(entry is MISFIT for entry in found) else found


def _converted_mapping(kinds: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, Mapping):
        return MISFIT
    found = {converted(kinds[0], k): converted(kinds[1], v) for k, v in value.items()}
    return MISFIT if any(entry is MISFIT for pair in found.items() for entry in pair) else found


def _truth(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, Plain) else ""
    return True if word in TRUE else False if word in FALSE else MISFIT


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        found = number_in(value)
        exponent = isinstance(found, float) and found.is_integer() and "e" in value.lower()
        value = int(cast(float, found)) if exponent else found
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    return value if fits else MISFIT


def _number(value: Any) -> Any:
    if isinstance(value, str):
        value = number_in(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISFIT
    return float(value) if isinstance(value, float) or abs(value) < LARGEST else MISFIT


def _text(value: Any) -> Any:
    if isinstance(value, Plain):
        return MISFIT if value.lower() in NULLS[:-1] else str(value)
    return value if isinstance(value, str) else MISFIT


def number_in(text: str) -> int | float | None:
    """Return the number that a text is, None if it is none."""
    text = text.strip()
    try:
        if WHOLE.fullmatch(text) and len(text) < 30:
            return int(text)
        if NUMBER.fullmatch(text):
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    except ValueError:  # 1__0
        pass
    return None


def is_null(value: Any) -> bool:
    """Tell whether a value means None, where there may be none."""
    return value is None or (isinstance(value, Plain) and value.lower() in NULLS)


def natural(value: Any) -> Any:
    """Return what a value means by itself."""
    if isinstance(value, Plain):
        if value.lower() in NULLS:
            return None
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        number = number_in(value)
        return str(value) if number is None else number
    if isinstance(value, Mapping):
        return {str(key): natural(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [natural(entry) for entry in value]
    return value


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(natural(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def copied(value: Any) -> Any:
    """Return a copy in which every mapping is a dict, and every list or tuple a list."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [copied(entry) for entry in value]
    return value


def join(path: str, name: str) -> str:
    """Return the path of a setting in the section at `path`."""
    return f"{path}.{name}" if path else str(name)
