"""The types of settings, and what a message and the help call them.

A limit stands in the type, once: pydantic checks it, `words` tells it.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
AboveOne = Annotated[float, Field(gt=1)]
# Of 64 bits at most, which torch and numpy can hold.
Count = Annotated[Annotated[int, Field(gt=0, lt=2**63)], "an integer > 0"]
Whole = Annotated[Annotated[int, Field(ge=0, lt=2**63)], "an integer >= 0"]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], "a list of texts"]
Sources = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)], "a text or a list of texts"
]


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(pair)
    return pair


_ordered = AfterValidator(_in_order)
# A text beside a type says in words what its values are.
PlainRate = Annotated[float, Field(gt=0, le=100)]
Rate = Annotated[PlainRate | Literal["auto"], "a finite number > 0 and <= 100, or auto"]
RateRange = Annotated[
    tuple[PlainRate, PlainRate], _ordered, "two numbers > 0 and <= 100, [lowest, highest]"
]
NumberRange = Annotated[tuple[float, float], _ordered, "two numbers, [low, high]"]
CountRange = Annotated[tuple[Count, Count], _ordered, "two integers > 0, [least, most]"]
ShareRange = Annotated[tuple[Share, Share], _ordered, "two numbers from 0 to 1, [low, high]"]
RangeOfEach = Annotated[
    Mapping[Text, ShareRange], "a mapping of prefix: [low, high], two numbers between 0 and 1"
]
Values = Annotated[Mapping[Text, Any], "a mapping of name: value"]
WeightOfEach = Annotated[Mapping[Text, Positive], "a mapping of prefix: number > 0"]


def _apart(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError(pair)
    return pair


Interval = Annotated[
    tuple[float, float], AfterValidator(_apart), "two numbers, [lowest, highest], not the same"
]

WORDS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a text"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@functools.cache
def kinds_of(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its limits."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def is_optional(kind: Any) -> bool:
    """Tell whether a setting may be None, which then stands last in its type."""
    return type(None) in typing.get_args(kind)


def bare(kind: Any) -> Any:
    """Return a type without its limits, and without None."""
    has_more = is_optional(kind) or typing.get_origin(kind) is Annotated
    return bare(typing.get_args(kind)[0]) if has_more else kind


def entry(kind: Any) -> Any:
    """Return the bare type of a setting, or of its entries if it is a list or a mapping."""
    kind = bare(kind)
    of = {tuple: 0, Mapping: 1}.get(typing.get_origin(kind))
    return kind if of is None else bare(typing.get_args(kind)[of])


def section_in(kind: Any) -> Any:
    """Return the dataclass that a setting holds one or a list of; None: it holds none."""
    return entry(kind) if is_dataclass(entry(kind)) else None


def choices(kind: Any) -> tuple[str, ...]:
    """Return the words that a setting, or an entry of it, is one of; none: it is no choice."""
    found = entry(kind)
    return typing.get_args(found) if typing.get_origin(found) is Literal else ()


def words(kind: Any) -> str:
    """Return in words what the values of a type are."""
    if is_optional(kind):
        return f"{words(typing.get_args(kind)[0])} or None"
    if typing.get_origin(kind) is Annotated:
        told = [each for each in kind.__metadata__ if isinstance(each, str)]
        return told[0] if told else words(typing.get_args(kind)[0]) + _limits(kind)
    if choices(kind):
        return f"one of {', '.join(choices(kind))}"
    if is_dataclass(kind):
        return f"a {bare(kind).__name__} {{{fields(kind)[0].name}: …}}"
    return WORDS[kind]


def _limits(kind: Any) -> str:
    """Return the limits of a number in words."""
    limits = {
        sign: getattr(each, name)
        for info in kind.__metadata__
        for each in getattr(info, "metadata", ())
        for name, sign in SIGNS.items()
        if hasattr(each, name)
    }
    if limits.keys() == {">=", "<="}:
        return f" between {limits['>=']} and {limits['<=']}"
    return " and".join(f" {sign} {limit}" for sign, limit in limits.items())
