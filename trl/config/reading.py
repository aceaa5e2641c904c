"""Dataclasses from YAML and flags, with everything that is wrong told at once.

A word of YAML without quotes means what the type of its setting makes of it: 1e-5 is a number for
a number and a text for a text.
"""

from __future__ import annotations

import itertools
import json
import re
import typing
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, cast

import yaml  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from trl.config.errors import SettingsError, bounded, refuse, shown
from trl.config.section import AND_MORE, MOST_TOLD, plain, sentences, unknown_setting
from trl.config.types import bare, choices, entry, kinds_of, section_in, words
from trl.config.writing import as_mapping

T = TypeVar("T")

Flags = Iterable[tuple[str, str]]
"""Paths, as `ppo.learning_rate` or `ppo.learning-rate`, and what is written for them."""

WORDS = dict.fromkeys(("", "~", "null", "none")) | dict.fromkeys(("true", "yes", "on"), True)
WORDS |= dict.fromkeys(("false", "no", "off"), False)
"""Words that are no text where a text is not wanted, and what they mean."""


class Plain(str):
    """A word of YAML without quotes: a text, a number, a truth or None, as its setting wants it."""

    __slots__ = ()


# -- YAML ----------------------------------------------------------------------------------------


LONGEST = 2**18
"""Characters of a file of settings; a long recipe has some thousand."""
DEEPEST = 32
"""Levels of lists and mappings in each other; settings have at most four."""
MOST_VALUES = 10_000
"""Values of a file, those that an alias repeats counted each time."""


class _Bounded(yaml.SafeLoader):  # type: ignore[misc]
    """Reads no more than settings may be, however little text says much."""

    depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[Any, tuple[int, int]] = {}
        if len(text) > LONGEST:
            self.refuse(f"the file must have at most {LONGEST:,} characters to be one of settings")

    def refuse(self, told: str, mark: Any = None) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, told, mark)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        mark = self.peek_event().start_mark
        if self.depth > DEEPEST:
            self.refuse(f"settings must be at most {DEEPEST} lists and mappings deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node not in self.sizes:  # an alias has the size of its anchor
            pairs = node.value if node.id == "mapping" else ()
            parts = node.value if node.id == "sequence" else itertools.chain(*pairs)
            # A node inside of itself, which cannot be made, has no size yet.
            sizes, levels = zip(
                (0, 0), *(self.sizes.get(each, (0, 0)) for each in parts), strict=True
            )
            self.sizes[node] = 1 + len(node.value) // 64 + sum(sizes), 1 + max(levels)
        size, below = self.sizes[node]
        if max(size, len(self.sizes)) > MOST_VALUES or self.depth + below > DEEPEST:
            most = f"at most {MOST_VALUES:,} values, {DEEPEST} lists and mappings deep"
            told = f"a file of settings must have {most}, with what an alias (*) repeats"
            self.refuse(told, mark)
        return node


class _Loader(_Bounded):
    """Leaves words to their settings, and refuses a name that is set twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.id == "scalar" and key.value in lines:
                also = f"but is set in line {lines[key.value]} too"
                told = f"`{bounded(key.value)}` must be set once, {also}"
                raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
            if key.id == "scalar" and not key.tag.endswith(":merge"):
                lines[key.value] = key.start_mark.line + 1
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


for _tag in ("str", "int", "float", "bool", "null", "timestamp", "value"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_tag}", lambda _, node: node.value if node.style else Plain(node.value)
    )


def parse_yaml(text: str, *, typed: bool = False) -> Any:
    """Return the dicts, lists and words of a text in YAML; None if it has none.

    Args:
        text: Of at most `LONGEST` characters.
        typed: Let words without quotes mean what they mean in YAML, whatever their setting.

    Raises:
        yaml.YAMLError: if it is no YAML, sets a name twice, names a Python object, or is larger
            than settings may be.
    """
    loader = (_Bounded if typed else _Loader)(text)
    loader.deep_construct = True  # a section inside of itself is an error then
    return loader.get_single_data()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return what a YAML file says, for `build`; an empty file says nothing.

    A file can name no Python object.

    Raises:
        SettingsError: naming file and line, if it is no YAML, sets a setting twice or has
            something else than settings.
        OSError: if the file is not there or cannot be read.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_file() and not path.is_dir():  # it may be waited for
        raise SettingsError(str(path), ["the file must be one, got a pipe or a device."])
    try:
        with path.open(encoding="utf-8-sig") as file:
            values = parse_yaml(file.read(LONGEST + 1))
    except UnicodeDecodeError as error:
        raise SettingsError(str(path), [f"the file must be text in UTF-8: {error}."]) from None
    except yaml.YAMLError as error:
        raise SettingsError(str(path), [_line_and_problem(error)]) from None
    if is_null(values):
        return {}
    if not isinstance(values, dict):
        told = f"the file must have lines of name: value, got {shown(values)}."
        raise SettingsError(str(path), [told])
    return values


def _line_and_problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    if not mark:
        return f"{error}".replace("\n", ": ")
    by_tab = "a tab; YAML is indented with spaces" if r"'\t'" in error.problem else error.problem
    return f"line {mark.line + 1}: {by_tab}."


# -- dataclasses ---------------------------------------------------------------------------------


def build(
    cls: type[T], values: Mapping[str, Any], *, flags: Flags = (), owner: str | None = None
) -> T:
    """Return the dataclass with its defaults, the values over them, and the flags over those.

    A flag for a text takes it as it is, in quotes if it is to be the text "none". A list or a
    section is written as YAML: `["a ", "b "]`, `{rank: 8}`; of a section, what is not named stays.
    `reward.0.weight` is the weight of the first reward; the number after the last adds one.

    Args:
        cls: Made by `section`; so are those that its fields hold.
        values: As YAML has them: mappings, lists, texts and numbers. They are not changed.
        flags: Of several with the same path the last one counts.
        owner: What the error calls all of it: the file, say. None: the name of the class. What is
            wrong because of the flags is told of the command line.

    Raises:
        SettingsError: with every problem there is. Each begins with the path of the setting.
    """
    tree, found, instance = dict(values), list[str](), cast(T, None)
    flags = list(flags)
    for path, text in flags:
        if len(found) == MOST_TOLD:
            found.append(AND_MORE)
            break
        try:
            tree = _with_flag(cls, tree, path, text)
        except ValueError as error:
            found.append(str(error))
    tree = _meant(cls, tree)
    completed = getattr(cls, "completed", None)
    tree = completed(tree) if completed else tree
    try:
        instance = TypeAdapter(cls).validate_json(json.dumps(tree))
    except ValidationError as error:
        found += sentences(error, cls, tree)
    if found and flags:
        raise _blamed(cls, values, flags, found, owner or cls.__name__)
    if found:
        raise SettingsError(owner or cls.__name__, found)
    return instance


def _blamed(
    cls: type, values: Mapping[str, Any], flags: Flags, found: list[str], owner: str
) -> SettingsError:
    """Return the error of which the file has what it has without the flags, and they the rest."""
    of_file: list[str] = []
    try:
        build(cls, values)
    except SettingsError as error:
        of_file = error.found
    names = {_dotted(path) for path, _ in flags}
    told = [each if each in of_file else _of_flags(each, names) for each in found]
    return SettingsError(owner if set(told) & set(of_file) else "command line", told)


def _of_flags(told: str, names: Set[str]) -> str:
    """Return a problem in which settings are named as the flags that have set them, or could."""
    of_names = "is not a setting" in told  # else the hint is a value

    def flag(found: re.Match[str]) -> str:
        parts = _dotted(found[2]).split(".")
        by_flag = any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))
        name = (
            "--" + ".".join(parts).replace("_", "-")
            if by_flag or (found[1] and of_names)
            else found[2]
        )
        return f"{found[1]}`{name}`"

    return re.sub(r"(Did you mean |)`([\w.\[\]]+)`", flag, told)


def _dotted(path: str) -> str:
    return re.sub(r"\[(\w+)\]", r".\1", path).replace("-", "_")


def is_null(value: Any) -> bool:
    """Return whether a value that a file says is none."""
    return value is None or (isinstance(value, Plain) and WORDS.get(value.lower(), "") is None)


def _meant(kind: Any, value: Any) -> Any:
    """Return a tree in which every word without quotes is what its setting makes of it.

    Args:
        kind: The type of the setting, or a section; of an unknown one, anything else.
        value: Its value.
    """
    if isinstance(value, Mapping):
        section = section_in(kind)
        kinds, others = (kinds_of(section), Any) if section else ({}, entry(kind))
        named = {str(name): (kinds.get(name, others), each) for name, each in value.items()}
        return {
            name: _meant(inner, each)
            for name, (inner, each) in named.items()
            if not (is_null(each) and is_dataclass(inner))  # ppo: with nothing after it
        }
    if isinstance(value, list | tuple):
        return [_meant(entry(kind), each) for each in value]
    if not isinstance(value, Plain):
        return plain(value)
    among = [bare(each) for each in typing.get_args(entry(kind))] or [entry(kind)]
    if value in choices(kind) or (str in among and not is_null(value)):
        return str(value)
    return _by_itself(value)


def _by_itself(word: str) -> Any:
    """Return what a word without quotes means by itself."""
    for read in (lambda word: WORDS[word.lower()], int, float):
        with suppress(KeyError, ValueError):
            meant: Any = read(word)
            is_whole = read is float and meant == meant // 1 and "e" in word.lower()  # 1e3
            return int(meant) if is_whole else meant
    return str(word)


# -- flags ---------------------------------------------------------------------------------------


def _with_flag(cls: Any, tree: dict[str, Any], path: str, text: str) -> dict[str, Any]:
    """Return the tree with the value that a flag names.

    Raises:
        ValueError: saying what is wrong with the flag.
    """
    names = _dotted(path).split(".")
    path = re.sub(r"\.(\d+)", r"[\1]", ".".join(names))
    kind: Any = cls
    for name in names:
        inside, is_list = section_in(kind), typing.get_origin(bare(kind)) is tuple
        if inside is None or not (name.isdecimal() if is_list else name in kinds_of(inside)):
            raise ValueError(unknown_setting(cls, path, text))
        kind = inside if is_list else kinds_of(inside)[name]
    value = _flag_value(kind, path, text)
    if "".join(names[1:2]).isdecimal() and names[0] not in tree:
        tree = tree | {names[0]: as_mapping(getattr(cls(), names[0]))}
    for name in reversed(names):
        value = {name: value}
    return cast("dict[str, Any]", _merged(tree, value, path))


def _flag_value(kind: Any, path: str, text: str) -> Any:
    """Return what the text of a flag says, for a setting of the type."""
    one_word = entry(kind) is bare(kind) and section_in(kind) is None
    may_be_list = text.startswith("[") and typing.get_origin(bare(kind)) in (
        UnionType,
        typing.Union,
    )
    if one_word and text and text[0] not in "\"'" and not may_be_list:
        return Plain(text)
    try:
        return parse_yaml(text) if text else ""
    except yaml.YAMLError as error:
        refuse(path, f"be {words(kind)}, as YAML", shown(text), _line_and_problem(error)[:-1])


def _merged(old: Any, new: Any, path: str) -> Any:
    """Return a section with what is new in it; an entry of a list goes by its number."""
    if isinstance(old, list) and isinstance(new, dict):
        ((number, value),) = new.items()
        if int(number) > len(old):
            refuse(path, f"have a number from 0 to {len(old)}", number)
        before, after = old[: int(number)], old[int(number) + 1 :]
        return [*before, _merged([*old, {}][int(number)], value, path), *after]
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: _merged(old.get(name), each, path) for name, each in new.items()}
    return new
