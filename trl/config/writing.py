"""Dataclasses as YAML, and in what two of them differ."""

from __future__ import annotations

import itertools
import numbers
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from trl.config.values import (
    FALSE,
    NULLS,
    TRUE,
    copied,
    default_of,
    kinds_of,
    number_in,
    section_of,
)


def as_mapping(instance: Any) -> Any:
    """Return a dataclass as dicts, lists, texts and numbers, as YAML and JSON have them."""
    if is_dataclass(instance):
        return {each.name: as_mapping(getattr(instance, each.name)) for each in fields(instance)}
    if isinstance(instance, list | tuple):
        return [as_mapping(entry) for entry in instance]
    return copied(instance)


def dump(instance: Any, *, skip_defaults: bool = False) -> str:
    """Return a dataclass as YAML that `build` reads back to an equal one.

    Args:
        instance: The dataclass.
        skip_defaults: Leave out what is as it would be anyway.
    """
    lines = _section(instance, None, skip_defaults)
    return "\n".join(lines) + "\n" if lines else "{}\n"


def _section(instance: Any, base: Any, skip_defaults: bool) -> list[str]:
    """Return the lines of a section, `base` having its defaults (None: those of the class)."""
    cls: Any = type(instance)
    lines: list[str] = []
    for name, kind in kinds_of(cls).items():
        value = getattr(instance, name)
        default = default_of(cls, name) if base is None else getattr(base, name)
        if skip_defaults and default is not MISSING and _same(value, default):
            continue
        inner, many = section_of(kind)
        if inner is None or not value:
            lines.append(f"{name}: {flow(value)}")
        elif not many:
            below = _section(value, default, skip_defaults)
            lines += [f"{name}:", *_indented(below, "  ")] if below else [f"{name}: {{}}"]
        else:
            lines.append(f"{name}:")
            for entry in value:
                first, *others = _section(entry, None, skip_defaults) or ["{}"]
                lines += [f"  - {first}", *_indented(others, "    ")]
    return lines


def _indented(lines: list[str], spaces: str) -> list[str]:
    return [spaces + line for line in lines]


def flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_word(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if is_dataclass(value):
        return flow(as_mapping(value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Real):
        return str(int(value)) if isinstance(value, numbers.Integral) else _number(float(value))
    return _word(str(value))


def _number(value: float) -> str:
    """Return a number exactly, with the point that YAML 1.1 knows it by: 1.0e-05."""
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    return text if "." in text else text.replace("e", ".0e")


def _word(text: str) -> str:
    """Return a text as YAML: in quotes, unless it can be taken for nothing else."""
    simple = re.fullmatch(r"[A-Za-z_/.][\w/.+-]*(:[\w/.+-]+)*", text, re.ASCII)
    special = text.lower() in (*NULLS, *TRUE, *FALSE, "y", "n", "---", "...")
    if simple and not special and number_in(text) is None:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    """Return a character as it stands between double quotes."""
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    code = ord(character)
    if character in short:
        return short[character]
    if character.isprintable():
        return character
    if code < 0x10000:
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return f"\\U{code:08x}"


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two dataclasses differ, and their values there.

    Raises:
        TypeError: if they are not of the same class.
    """
    if type(one) is not type(other) or not is_dataclass(one):
        names = f"{type(one).__name__} and {type(other).__name__}"
        raise TypeError(f"`one` and `other` must be dataclasses of the same class, got {names}.")
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields(one):
        found |= _differences(getattr(one, field.name), getattr(other, field.name), field.name)
    return found


def _differences(one: Any, other: Any, path: str) -> dict[str, tuple[Any, Any]]:
    if is_dataclass(one) and type(one) is type(other):
        return {f"{path}.{name}": pair for name, pair in differences(one, other).items()}
    if isinstance(one, tuple) and isinstance(other, tuple) and any(map(is_dataclass, one + other)):
        found: dict[str, tuple[Any, Any]] = {}
        for index, pair in enumerate(itertools.zip_longest(one, other)):
            found |= _differences(*pair, f"{path}[{index}]")
        return found
    return {} if _same(one, other) else {path: (as_mapping(one), as_mapping(other))}


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal; nan is nan here."""
    return bool(one == other) or repr(one) == repr(other)
