"""Dataclasses whose fields pydantic checks when they are made, with errors in our words."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trl.config.errors import SettingsError, bounded, closest, closest_path, problem, shown
from trl.config.listing import paths
from trl.config.moved import field_told
from trl.config.types import bare, choices, kinds_of, section_in, words
from trl.config.writing import as_mapping

T = TypeVar("T")

Contradiction = tuple[str, ...]
"""The path of a setting from the section on, the rule that it breaks, and how to mend it: see
`problem`. The last may be left out."""

CONFIG = ConfigDict(
    extra="forbid",
    strict=True,  # True is not 1, and "64" not 64
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)


MOST_TOLD = 20
"""Problems; a file of something else has one on every line."""
AND_MORE = "… and more."
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose constructor checks types and limits of the fields.

    If it has a method `contradictions`, what that yields of fields that each are in order is wrong
    too. In Python, lists may stand for tuples and NumPy's numbers for Python's.
    """
    if hasattr(cls, "contradictions"):
        cls.__post_init__ = _refuse_contradictions  # type: ignore[attr-defined]
    made: Any = dataclass(frozen=True, slots=True, config=CONFIG)(cls)
    for base in cls.__mro__[1:-1]:  # pydantic looks under the fields of the class alone
        for name, above in base.__pydantic_fields__.items():  # type: ignore[attr-defined]
            inherited = made.__pydantic_fields__[name]
            inherited.description = inherited.description or above.description
    checked, known = made.__init__, inspect.signature(made)

    @functools.wraps(checked)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        for name in (name for name in kwargs if name not in known.parameters):
            of_ppo = "cliprange" in known.parameters and field_told(name)
            hint = closest(name, known.parameters) or of_ppo or ""
            raise TypeError(f"{cls.__name__} has no field `{name}`.{hint}")
        given = known.bind_partial(*args, **kwargs).arguments  # too many, or twice: a TypeError
        try:
            checked(self, **{name: plain(value) for name, value in given.items()})
        except ValidationError as error:
            raise SettingsError(cls.__name__, sentences(error, made, given)) from None

    made.__init__ = init
    return made  # type: ignore[no-any-return]


def _refuse_contradictions(self: Any) -> None:
    found = []
    for path, rule, *fix in self.contradictions():
        value = self
        for name in re.findall(r"\w+", path):
            value = value[int(name)] if name.isdecimal() else getattr(value, name)
        found.append(problem(path, rule, shown(as_mapping(value)), *fix))
    if found:
        raise SettingsError(type(self).__name__, found)


def plain(value: Any) -> Any:
    """Return tuples for lists, and Python's numbers for NumPy's; in mappings too."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return value.item() if getattr(value, "ndim", None) == 0 else value


def sentences(error: ValidationError, cls: Any, tree: Mapping[str, Any]) -> list[str]:
    """Return what pydantic found, a sentence for each setting.

    Args:
        error: What it raised.
        cls: The dataclass that was to be made.
        tree: From what.
    """
    found: dict[str, list[str]] = {}
    for each in error.errors(include_url=False):
        if len(found) == MOST_TOLD:
            return [*itertools.chain.from_iterable(found.values()), AND_MORE]
        path, kind, value = _blamed(cls, each["loc"], tree)
        inner = each.get("ctx", {}).get("error")
        if isinstance(inner, SettingsError):
            told = [f"`{path}.{one[1:]}" if path else one for one in inner.found]
        elif each["type"] == "unexpected_keyword_argument":
            told = [unknown_setting(cls, path, value)]
        elif each["type"] == "missing":
            told = [problem(path, f"be given: {words(kind)}")]
        else:
            told = [_no_such_value(path, kind, value, each["input"])]
        found.setdefault(path, told)
    return list(itertools.chain.from_iterable(found.values()))


def _no_such_value(path: str, kind: Any, value: Any, part: Any) -> str:
    """Return the sentence for a value, or a part of it, that is not of a setting's type."""
    fix = ""
    if is_dataclass(bare(kind)) and isinstance(value, Mapping):
        # A file may have mappings for sections; in Python they are objects.
        fix = f"pass {bare(kind).__name__}(**{{…}})"
    elif isinstance(value, str) and re.fullmatch(NUMBER, value):
        fix = f"write {value}, without quotes"
    hint = closest(str(part), choices(kind))
    return problem(path, f"be {words(kind)}", shown(value), fix) + hint


def _blamed(cls: Any, loc: tuple[int | str, ...], tree: Any) -> tuple[str, Any, Any]:
    """Return the path of the setting that an error is at or inside of, its type, and its value."""
    kind, path, value = cls, "", tree
    for part in loc:
        inside = section_in(kind)
        if inside is None:
            break
        kind = inside if isinstance(part, int) else kinds_of(inside).get(part)
        path = f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}".lstrip(".")
        value = value[part] if isinstance(part, int) else value.get(part)
    return path, kind, value


def unknown_setting(cls: Any, path: str, value: Any) -> str:
    """Return the sentence for a path that is no setting of the dataclass."""
    every, path = [setting.path.replace(".N", "[0]") for setting in paths(cls)], bounded(path)
    return f"`{path}` is not a setting, got {shown(value)}.{closest_path(path, every)}"


def check_values(
    owner: str, values: Mapping[str, tuple[Any, Any]], found: Sequence[str] = ()
) -> None:
    """Check parameters as the fields of a section are checked.

    Args:
        owner: What the error calls them all.
        values: For each name the type, such as `Positive`, and the value.
        found: Problems that are known already, to be told with the others.

    Raises:
        SettingsError: with every problem there is.
    """
    told = list(found)
    for name, (kind, value) in values.items():
        try:
            TypeAdapter(kind, config=CONFIG).validate_python(plain(value))
        except ValidationError:
            told.append(_no_such_value(name, kind, value, value))
    if told:
        raise SettingsError(owner, told)
