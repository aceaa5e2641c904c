"""What a YAML file says: mappings, lists and words, whose meaning is left to the settings."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from trl.config.ppo import SettingsError
from trl.config.values import MISFIT, Plain, is_null, shown

TAG = "tag:yaml.org,2002:"
TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value", "map", "seq")
"""What may stand in a settings file; PyYAML gives these to words by their looks."""


class Unreadable(ValueError):
    """What is wrong with a text that is to be YAML, and in which line (from 1)."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return what a YAML file says, for `build`; an empty file says nothing.

    A file can name no Python object.

    Raises:
        SettingsError: naming file and line, if it is no YAML, sets a setting twice or has
            something else than settings.
        OSError: if the file is not there (with the closest one that is) or cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a YAML file, but is a folder: name a file in it.")
    if not path.is_file():
        there = sorted(str(each) for each in path.parent.glob("*.y*ml"))
        near = difflib.get_close_matches(str(path), there, 1, 0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"There is no file {path}.{hint}")
    try:
        values = parse_yaml(_decoded(path.read_bytes()))
        if is_null(values):
            return {}
        if not isinstance(values, dict):
            what = "a list" if isinstance(values, list) else shown(values)
            raise Unreadable(1, f"the file must have lines of name: value, got {what}.")
    except Unreadable as error:
        raise SettingsError(str(path), [f"line {error.line}: {error}"]) from None
    return values


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = data[error.start], data[: error.start].count(b"\n") + 1
        problem = f"the file must be text in UTF-8, got the byte 0x{byte:02x}: save it as UTF-8."
        raise Unreadable(line, problem) from None


def parse_yaml(text: str) -> Any:
    """Return the dicts, lists and words of a text in YAML; None if it has none.

    Raises:
        Unreadable: if it is no YAML, or more than that.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(mark.line + 1 if mark else 1, _explained(error, text)) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"the character {chr(error.character)!r} must not stand in YAML: take it out."
        raise Unreadable(line, problem) from None
    return None if node is None else _Nodes().value(node)


def _explained(error: Any, text: str) -> str:
    """Return in words what the parser stumbled over."""
    problem, mark, lines = str(error.problem), error.problem_mark, text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    near = repr(line.strip())
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "a line must not begin with a tab: use spaces."
    if "mapping values are not allowed" in problem:
        return (
            f"{near} must be one name: value, as far in as those beside it: mend the spaces "
            "before it, or put a value with a colon in quotes."
        )
    if "expected <block end>" in problem:
        return f"{near} must be as far in as those beside it: mend the spaces before it."
    if "could not find expected ':'" in problem:
        return f"a name must have a colon and a space after it, near {near}: add them."
    if "found another document" in problem:
        return "the file must hold one document: take out the line ---."
    if "undefined alias" in problem:
        return f"{problem}: it must be set before, with an anchor, &name."
    if "cannot start any token" in problem:
        return f"{problem}, near {near}: put the value in quotes."
    return f"{problem}, near {near}: close what is open, or put texts in quotes."


class _Nodes:
    """Turns the nodes of a YAML document into dicts, lists and words."""

    def __init__(self) -> None:
        self.read: dict[int, Any] = {}

    def value(self, node: Any) -> Any:
        """Return what a node holds; a node with an anchor is read once."""
        if id(node) not in self.read:
            self.read[id(node)] = MISFIT  # while it is under way
            self.read[id(node)] = self._value(node)
        if self.read[id(node)] is MISFIT:
            raise Unreadable(_line(node), "an anchor must not stand inside itself: take it out.")
        return self.read[id(node)]

    def _value(self, node: Any) -> Any:
        if node.tag.removeprefix(TAG) not in TAGS:
            raise Unreadable(
                _line(node),
                f"{node.tag.replace(TAG, '!!')} must be left out: settings are texts, numbers, "
                "lists and sections.",
            )
        if node.id == "scalar":
            return Plain(node.value) if node.style is None else str(node.value)
        if node.id == "sequence":
            return [self.value(entry) for entry in node.value]
        return self._mapping(node)

    def _mapping(self, node: Any) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == f"{TAG}merge":
                merged = self._aliases(value) | merged
                continue
            if key.id != "scalar":
                raise Unreadable(_line(key), "a name must be a word, got a list or a section.")
            name = str(key.value)
            if name in own:
                raise Unreadable(
                    _line(key),
                    f"`{name}` must be set once, but is set in line {lines[name]} too: keep one.",
                )
            own[name], lines[name] = self.value(value), _line(key)
        return merged | own

    def _aliases(self, node: Any) -> dict[str, Any]:
        """Return what stands after `<<:`; of several sections the first one counts."""
        merged: dict[str, Any] = {}
        for entry in node.value if node.id == "sequence" else [node]:
            section = self.value(entry)
            if not isinstance(section, dict):
                raise Unreadable(_line(entry), "<< must have the alias of a section after it.")
            merged = section | merged
        return merged


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
