"""Dataclasses as YAML, and in what two of them differ."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import TypeAdapter


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Puts quotes around "none" too, which `build` reads as null."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("none", re.IGNORECASE), "nN")


def as_mapping(instance: Any) -> Any:
    """Return a dataclass as dicts, lists, texts and numbers, as YAML and JSON have them."""
    return TypeAdapter(Any).dump_python(instance, mode="json")


def flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of them, by dotted names: `ppo.gamma`, `reward.0.kind`."""
    entries = nested
    if isinstance(nested, list) and any(isinstance(entry, Mapping) for entry in nested):
        entries = dict(enumerate(nested))
    if not isinstance(entries, Mapping) or (prefix and not entries):
        return {prefix: nested}
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def dump(instance: Any, *, texts: bool = False) -> str:
    """Return a dataclass as YAML that `build` reads back to an equal one.

    Args:
        instance: Made by `section`.
        texts: Write the text under each field as a comment above it.
    """
    lines: list[str] = []
    for name, field in type(instance).__pydantic_fields__.items():
        value = getattr(instance, name)
        if texts and field.description:
            comment = " ".join(field.description.split())
            lines += textwrap.wrap(comment, 96, initial_indent="# ", subsequent_indent="# ")
        if is_dataclass(value):
            lines += [f"{name}:", textwrap.indent(dump(value, texts=texts), "  ").rstrip()]
        else:
            one = {name: as_mapping(value)}
            # PyYAML reads rare line breaks as others if they stand there as they are.
            simple = json.dumps(one, ensure_ascii=False).isprintable()
            written = yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=simple)
            lines.append(written.rstrip("\n"))
    return "\n".join(lines) + "\n"


def differences(one: Any, other: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two dataclasses differ, and their values there.

    Args:
        one: A dataclass, or what a setting of it holds.
        other: The same of another one.
        path: Of what is compared.
    """
    if is_dataclass(one) and type(one) is type(other):
        names = [field.name for field in fields(one)]
        parts = [(f"{path}.{name}", getattr(one, name), getattr(other, name)) for name in names]
    elif isinstance(one, tuple) and isinstance(other, tuple) and any(map(is_dataclass, one)):
        pairs = enumerate(itertools.zip_longest(one, other))
        parts = [(f"{path}[{index}]", *pair) for index, pair in pairs]
    else:
        return {} if one == other else {path: (as_mapping(one), as_mapping(other))}
    found: dict[str, tuple[Any, Any]] = {}
    for name, mine, others in parts:
        found |= differences(mine, others, name.lstrip("."))
    return found
