"""Dataclasses from values, with everything that is wrong told at once."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar, cast

from trl.config.flags import Flags, overridden
from trl.config.listing import paths
from trl.config.ppo import OLD_SPELLINGS, OTHER_IDEAS, SettingsError
from trl.config.values import (
    MISFIT,
    converted,
    default_of,
    described,
    is_null,
    is_optional,
    join,
    kinds_of,
    natural,
    section_of,
    shown,
)
from trl.config.writing import flow

T = TypeVar("T")


def build(
    cls: type[T], values: Mapping[str, Any], *, flags: Flags = (), owner: str | None = None
) -> T:
    """Return the dataclass with its defaults, the values over them, and the flags over those.

    Args:
        cls: A frozen dataclass, whose fields may be dataclasses, optional ones and lists of them.
        values: As YAML has them: mappings, lists, texts and numbers.
        flags: See `override`.
        owner: What the error calls all of it: the file, say. None: the name of the class.

    Raises:
        SettingsError: with every problem there is. Each begins with the path of the setting.
    """
    values, found = overridden(cls, values, flags)
    reader = _Reader(cls, found)
    instance = reader.section(cls, values, "", None)
    if reader.found:
        raise SettingsError(owner or cls.__name__, reader.found)
    return cast(T, instance)


class _Reader:
    """Reads a tree of settings and collects what is wrong with it.

    Args:
        root: The dataclass of the whole tree.
        found: Problems so far.
    """

    def __init__(self, root: type, found: list[str]) -> None:
        self.root = root
        self.found = found
        self.broken: set[str] = set()
        """Paths of settings that are not as the user wants them: what is wrong only because of
        them is no problem of its own."""

    def section(self, cls: type, values: Mapping[str, Any], path: str, base: Any) -> Any:
        """Return a section, without the settings that are wrong; None if it cannot be made.

        Args:
            cls: Its dataclass.
            values: Of its fields.
            path: Where it is; "" for the whole.
            base: An instance with the defaults; None: those of the class.
        """
        kinds = kinds_of(cls)
        given: dict[str, Any] = {}
        misfits: dict[str, str] = {}  # what those of another type must be
        for name, value in values.items():
            if name not in kinds:
                self._unknown(cls, path, name, value)
                continue
            kind, at = kinds[name], join(path, name)
            inner, many = section_of(kind)
            if inner is None:
                given[name] = converted(kind, value)
                if given[name] is MISFIT:
                    given[name], misfits[name] = natural(value), described(kind)
                    self.broken.add(at)
            elif many:
                given[name] = self._list(inner, value, at)
            elif is_null(value) and is_optional(kind):
                given[name] = None
            else:
                default = _default(cls, name, base)
                given[name] = self._inner(inner, {} if is_null(value) else value, at, default)
        given = {name: value for name, value in given.items() if value is not MISFIT}
        return self._made(cls, given, misfits, path, base)

    def _inner(self, cls: type, values: Any, at: str, base: Any) -> Any:
        """Return a section of a section."""
        if isinstance(values, Mapping):
            return self.section(cls, values, at, base)
        name, first = re.split(r"\.|(?=\[)", at)[-1], fields(cls)[0].name
        return self._report(
            at,
            f"`{at}` must have settings of its own, got {shown(values)}: write "
            + (f"- {first}: …" if name.startswith("[") else f"{name}: {{{first}: …}}."),
        )

    def _list(self, cls: type, value: Any, at: str) -> Any:
        """Return a list of sections."""
        if not isinstance(value, list | tuple):
            first = fields(cls)[0].name
            return self._report(
                at,
                f"`{at}` must be a list, got {shown(value)}: begin each entry with a dash, "
                f"- {first}: …",
            )
        entries = [
            self._inner(cls, entry, f"{at}[{index}]", None) for index, entry in enumerate(value)
        ]
        return MISFIT if any(entry in (None, MISFIT) for entry in entries) else tuple(entries)

    def _made(
        self, cls: type, given: dict[str, Any], misfits: dict[str, str], path: str, base: Any
    ) -> Any:
        """Make the dataclass; without the settings that it refuses, until it refuses none."""
        known_broken = self.broken - {join(path, name) for name in misfits}
        instance, refused = None, set[str]()
        try:
            instance = cls(**given) if base is None else replace(base, **given)
        except SettingsError as error:
            for problem in error.found:
                name = _blamed(problem)
                field = _own_field(cls, name)
                if field is not None:
                    refused.add(field)
                    self.broken.add(join(path, field))
                self.broken.add(join(path, name))
                own = {join(path, name)} if name in given else set()
                if not _follows(problem, path, known_broken - own):
                    self._refuse(cls, problem, given, path, base)
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            if not misfits and not _without_default(cls) - given.keys():
                raise
        for name in misfits.keys() - refused:  # the dataclass has no check of its own
            problem = f"`{name}` must be {misfits[name]}, got {given[name]!r}."
            self._refuse(cls, problem, given, path, base)
        dropped = (refused | misfits.keys()) & given.keys()
        if dropped:
            kept = {name: value for name, value in given.items() if name not in dropped}
            return self._made(cls, kept, {}, path, base)
        if instance is None:
            for name in sorted(_without_default(cls) - given.keys()):
                at = join(path, name)
                if at not in self.broken:
                    self._report(at, f"`{at}` must be set, got nothing.")
        return base if instance is None else instance

    def _refuse(
        self, cls: type, problem: str, given: Mapping[str, Any], path: str, base: Any
    ) -> None:
        """Report what a dataclass said of its field, with the path and what would be right."""
        name = _blamed(problem)
        if isinstance(given.get(name), list):  # as it is written, not as the dataclass keeps it
            kept = f"got {tuple(given[name])!r}."
            problem = problem.replace(kept, f"got {given[name]!r}.")
        ends_so = name in given and problem.endswith(f"got {given[name]!r}.")
        ends_so = ends_so and " for kind " not in problem  # the default is of another kind
        if ends_so and section_of(kinds_of(cls)[name])[0] is None:
            value, default = given[name], _default(cls, name, base)
            is_text = isinstance(value, str)
            listed = converted(kinds_of(cls)[name], [value]) if is_text else MISFIT
            if listed is not MISFIT:
                problem = f"{problem[:-1]}: write {flow(listed)}."
            elif default is not None and default is not MISSING:
                problem += f" The default is {flow(default)}."
        self.found.append(f"`{path}.{problem[1:]}" if path else problem)

    def _report(self, at: str, problem: str) -> Any:
        self.found.append(problem)
        self.broken.add(at)
        return MISFIT

    def _unknown(self, cls: type, path: str, name: str, value: Any) -> None:
        """Report a name that the section does not have, and where it may belong."""
        at = join(path, name)
        problem = f"`{at}` is not a setting, got {shown(value)}."
        everywhere = _everywhere(self.root)
        if "." in name and at in everywhere:
            written = ": {".join(name.split(".")) + ": …" + "}" * name.count(".")
            self._report(at, f"{problem} Write it as a section, {written}.")
            return
        near = _near(cls, path, name, everywhere)
        if near:
            hint = f"Did you mean {' or '.join(f'`{each}`' for each in near)}?"
        else:
            where = f"`{path}`" if path else cls.__name__
            hint = f"The settings of {where} are {', '.join(kinds_of(cls))}."
        self._report(at, f"{problem} {hint}")
        self.broken.update(near)


def _default(cls: type, name: str, base: Any) -> Any:
    return default_of(cls, name) if base is None else getattr(base, name)


def _without_default(cls: type) -> set[str]:
    return {name for name in kinds_of(cls) if default_of(cls, name) is MISSING}


def _blamed(problem: str) -> str:
    """Return the name of the setting that a problem begins with."""
    found = re.match(r"`([^`]+)`", problem)
    return found[1] if found else ""


def _own_field(cls: type, name: str) -> str | None:
    """Return the field that a blamed name is, or is inside of; None: it is in another section."""
    kinds = kinds_of(cls)
    field = name if name in kinds else re.split(r"[.\[]", name)[0]
    mine = field in kinds and (name == field or section_of(kinds[field])[0] is None)
    return field if mine else None


def _follows(problem: str, path: str, broken: set[str]) -> bool:
    """Tell whether a problem of a section names a setting that could not be read."""
    for at in broken:
        if not path or at.startswith((f"{path}.", f"{path}[")):
            inside = at[len(path) :].lstrip(".").split("[")[0]
            if inside and re.search(rf"(?<![\w.]){re.escape(inside)}(?!\w)", problem):
                return True
    return False


@functools.cache
def _everywhere(root: Any) -> tuple[str, ...]:
    """Return the path of every setting, as messages have it."""
    return tuple(setting.path.replace(".N", "[0]") for setting in paths(root))


def _near(cls: type, path: str, name: str, everywhere: tuple[str, ...]) -> list[str]:
    """Return the paths of the settings that an unknown name may mean, the likeliest first."""
    if "." in name:  # from a flag
        return difflib.get_close_matches(join(path, name), everywhere, 1, 0.7)
    wanted = name.replace("-", "_")
    wanted = OLD_SPELLINGS.get(wanted) or OTHER_IDEAS.get(wanted) or wanted
    here = list(kinds_of(cls))
    if wanted in here:
        return [join(path, wanted)]
    ends = [at.split(".")[-1] for at in everywhere]
    near = [join(path, each) for each in difflib.get_close_matches(wanted, here, 1, 0.7)]
    near += [at for at, end in zip(everywhere, ends, strict=True) if end == wanted][:2]
    if not near:
        far = difflib.get_close_matches(wanted, ends, 1, 0.7)
        near = [at for at, end in zip(everywhere, ends, strict=True) if end in far][:2]
    return near
