"""Flags over the values of a file."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from trl.config.ppo import SettingsError
from trl.config.values import (
    MISFIT,
    Plain,
    copied,
    default_of,
    is_mapping,
    join,
    kinds_of,
    section_of,
    without_none,
)
from trl.config.writing import as_mapping
from trl.config.yaml_text import Unreadable, parse_yaml

Flags = Iterable[tuple[str, str]]
"""Paths, as `ppo.learning_rate` or `ppo.learning-rate`, and what is written for them."""


def override(cls: type, values: Mapping[str, Any], flags: Flags) -> dict[str, Any]:
    """Return the values with flags in place of some of them.

    A flag for a text takes it as it is, in quotes if it is to be the text "none". A list or a
    section is written as YAML: `["a ", "b "]`, `{rank: 8}`; of a section, what is not named stays.
    `reward.0.weight` is the weight of the first reward; the number after the last adds one.

    Args:
        cls: The dataclass that the values are for.
        values: See `build`; they are not changed.
        flags: Of several with the same path the last one counts.

    Raises:
        SettingsError: for a flag that cannot be read; a wrong name or value is `build`'s to find.
    """
    changed, found = overridden(cls, values, flags)
    if found:
        raise SettingsError(cls.__name__, found)
    return changed


def overridden(
    cls: type, values: Mapping[str, Any], flags: Flags
) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of the values with the flags in it, and the problems of the flags."""
    changed, found = cast("dict[str, Any]", copied(values)), list[str]()
    for path, text in flags:
        names = re.sub(r"\[(\w+)\]", r".\1", path).replace("-", "_").split(".")
        _set(cls, changed, names, text, "", found)
    return changed, found


def _set(
    cls: type, values: dict[str, Any], names: list[str], text: str, path: str, found: list[str]
) -> None:
    """Set the value that a flag names, in place."""
    name, *rest = names
    at, kind = join(path, name), kinds_of(cls).get(name)
    inner, many = (None, False) if kind is None else section_of(kind)
    if kind is None or (rest and inner is None):
        values[".".join(names)] = Plain(text)  # `build` refuses it, with the closest name
    elif not rest:
        value, before = _parsed(kind, text, at, found), values.get(name)
        if value is not MISFIT:
            merged = inner is not None and isinstance(value, dict) and isinstance(before, dict)
            values[name] = cast("dict[str, Any]", before) | value if merged else value
    elif many:
        _set_entry(cast(type, inner), cls, values, names, text, at, found)
    else:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        _set(cast(type, inner), values[name], rest, text, at, found)


def _set_entry(
    inner: type,
    cls: type,
    values: dict[str, Any],
    names: list[str],
    text: str,
    at: str,
    found: list[str],
) -> None:
    """Set a value in an entry of a list of sections, or in a new one after the last."""
    name, number, *rest = names
    entries = values.setdefault(name, as_mapping(default_of(cls, name)))
    if not isinstance(entries, list):
        return  # `build` refuses it
    if not number.isdecimal() or int(number) > len(entries) or not rest:
        first = fields(cast(Any, inner))[0].name
        found.append(
            f"`{at}.{'.'.join([number, *rest])}` must have a number from 0 to {len(entries)} and "
            f"the name of a setting, got {text!r}: write {at}.0.{first}, say."
        )
        return
    if int(number) == len(entries):
        entries.append({})
    entry = entries[int(number)]
    if isinstance(entry, dict):
        _set(inner, entry, rest, text, f"{at}[{number}]", found)


def _parsed(kind: Any, text: str, at: str, found: list[str]) -> Any:
    """Return what the text of a flag says, for a setting of the type."""
    kind = without_none(kind)
    if kind is str:
        return _parsed_text(text)
    if typing.get_origin(kind) is not tuple and not is_mapping(kind) and not is_dataclass(kind):
        return Plain(text.strip())
    try:
        return parse_yaml(text)
    except Unreadable as error:
        example = "[…, …]" if typing.get_origin(kind) is tuple else "{name: …}"
        found.append(f"`{at}` must be YAML, as {example}, got {text!r}: {error}")
        return MISFIT


def _parsed_text(text: str) -> str:
    """Return the text of a flag, without the quotes around it if it has them."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        try:
            return cast(str, parse_yaml(text))
        except Unreadable:
            return text
    return Plain(text) if text else ""
