"""What there is to set: for help, and for pages of documentation."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, NamedTuple

from trl.config.values import (
    default_of,
    described,
    is_optional,
    kinds_of,
    section_of,
    without_none,
)
from trl.config.writing import differences, flow


class Setting(NamedTuple):
    """One setting of a dataclass or of those inside it."""

    path: str
    """As `ppo.learning_rate`; N stands for the number of an entry, from 0: `reward.N.weight`."""
    kind: str
    """What its values are, in words."""
    default: str
    """As YAML; empty if there is none."""
    text: str
    """The text under the field."""
    is_truth: bool
    """Whether it is true or false."""


@functools.cache
def paths(cls: Any) -> tuple[Setting, ...]:
    """Return every setting of a dataclass and of those inside it, in order.

    A section is there by what is in it; an optional one, and a list, by itself too.
    """
    return tuple(_settings(cls, "", None))


def _settings(cls: type, prefix: str, base: Any) -> Iterator[Setting]:
    texts = texts_under_fields(cls)
    for name, kind in kinds_of(cls).items():
        default = default_of(cls, name) if base is None else getattr(base, name)
        inner, many = section_of(kind)
        path = f"{prefix}{name}"
        if inner is None or many or is_optional(kind):
            written = "" if default is MISSING else _changes(default) if many else flow(default)
            is_truth = without_none(kind) is bool
            yield Setting(path, described(kind), written, texts.get(name, ""), is_truth)
        if inner is not None and many:
            yield from _settings(inner, f"{path}.N.", None)
        elif inner is not None:
            yield from _settings(inner, f"{path}.", None if default is MISSING else default)


def _changes(entries: Any) -> str:
    """Return a list of sections in one line, without their defaults."""
    changed = [
        {path: pair[1] for path, pair in differences(type(entry)(), entry).items()}
        for entry in entries
    ]
    return flow(changed)


def texts_under_fields(cls: type) -> dict[str, str]:
    """Return the string literal that follows each annotated field in the source of a class."""
    texts = {}
    for entry, below in itertools.pairwise(_definitions(cls.__module__)[cls.__name__].body):
        if (
            isinstance(entry, ast.AnnAssign)
            and isinstance(entry.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[entry.target.id] = inspect.cleandoc(str(below.value.value))
    return texts


@functools.cache
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes in the source of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
