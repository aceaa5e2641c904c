"""How models write tool calls, and how they are read out of what a policy has written."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from trl.config.errors import closest, refuse, shown

DECODER = json.JSONDecoder(strict=False)
"""A line may end within a string: models write so, and nothing else can be meant."""
ARGUMENTS = ("arguments", "parameters")
"""What the arguments may be called."""
FORM = 'Write {"name": "...", "arguments": {...}}.'
PYTHON_TAG = "<|python_tag|>"
CLOSERS = 20
"""Closing parentheses that are tried as the end of arguments."""


@dataclass(frozen=True)
class Call:
    """A tool call that could be read."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    """What the model calls the call, if it does: Mistral's answers name it."""


@dataclass(frozen=True)
class BadCall:
    """What looks like a tool call and cannot be read."""

    text: str
    """As it was written."""
    problem: str
    """What is wrong, in sentences that a model can act on."""


Calls = list[Call | BadCall]
Schemas = Sequence[Mapping[str, Any]]
"""{"type": "function", "function": {"name": …, "description": …, "parameters": …}} of each tool."""


@dataclass(frozen=True)
class CallFormat:
    """A way to write tool calls."""

    read: Callable[[str, Schemas], Calls]
    """The calls of a turn's text, in their order; none for a text without any. The tools that there
    are come second, for a format whose calls are known by their names alone."""
    write: Callable[[str, Mapping[str, Any]], str] | None = None
    """A call, of a name and arguments; None: only its user knows how."""
    mark: str = ""
    """What a chat template has in it that means this format."""


def call_format(name: str) -> CallFormat:
    r"""Return the format of `CALL_FORMATS` with that name, or that of a regular expression.

    Its groups `name` and `arguments` (a JSON object) are the call; groups with other names are
    arguments that are texts, as in `(?P<name>\w+)\((?P<expression>[^)]*)\)`. A single group without
    a name is a JSON object with both. The dot matches the end of a line. How long an expression
    takes is its user's affair.

    Raises:
        ValueError: if the name is neither.
    """
    if not isinstance(name, str):
        refuse("call_format", "be a text", shown(name), error=TypeError)
    if name in CALL_FORMATS:
        return CALL_FORMATS[name]
    rule = f"be one of {list(CALL_FORMATS)} or a regular expression with a group"
    try:
        pattern = re.compile(name, re.DOTALL)
    except re.error as error:
        refuse("call_format", rule, f"{shown(name)} ({error})")
    if not pattern.groups or (pattern.groupindex and "name" not in pattern.groupindex):
        fix = "name the groups `name` and `arguments`"
        refuse("call_format", rule, shown(name) + closest(name, CALL_FORMATS), fix)
    return CallFormat(partial(_read_pattern, pattern))


def described(schemas: Schemas, form: CallFormat) -> str:
    """Return what a model is told of its tools, and of how they are called, by an example."""
    functions = [schema.get("function", schema) for schema in schemas]
    lines = ["You can call these tools:", *(_json(function) for function in functions)]
    if form.write is not None:
        parameters = functions[0].get("parameters", {}).get("properties", {})
        example = form.write(
            functions[0]["name"], {name: _example(given) for name, given in parameters.items()}
        )
        lines += ["", "To call a tool, write this and nothing after it:", example]
        lines += ["The answer of the tool comes in the next message."]
    return "\n".join(lines)


def _example(schema: Mapping[str, Any]) -> Any:
    """Return a value that fits a parameter's schema."""
    values = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    return schema["enum"][0] if schema.get("enum") else values.get(str(kind), "...")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and where it ends.

    Raises:
        ValueError: in words for the model.
    """
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("The call is nested too deeply.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}, at character {error.pos - start + 1} of it"
        raise ValueError(f"The call is no valid JSON ({where}). {FORM}") from None
    except ValueError:
        raise ValueError("A number in the call is too long.") from None


def _as_call(found: Any, text: str) -> Call | BadCall:
    """Return the call that a JSON value is."""
    if isinstance(found, dict) and isinstance(found.get("function"), dict):  # OpenAI's form
        found = found | found["function"]
    if not isinstance(found, dict):
        return BadCall(text, f"The call must be a JSON object. {FORM}")
    name = found.get("name", found.get("function"))
    if not isinstance(name, str) or not name.strip():
        return BadCall(text, f"The call does not name its tool. {FORM}")
    arguments = next((found[key] for key in ARGUMENTS if key in found), None)
    if isinstance(arguments, str):  # JSON within JSON
        try:
            arguments = _value(arguments.strip())[0] if arguments.strip() else None
        except ValueError as error:
            return BadCall(text, str(error))
    if not isinstance(arguments, dict | None):
        return BadCall(text, f'The "arguments" of {name} must be a JSON object. {FORM}')
    return Call(name, arguments or {}, found["id"] if isinstance(found.get("id"), str) else "")


def _read_at(text: str, start: int, ends: re.Pattern[str], **named: str) -> tuple[Calls, int]:
    """Return the call, or the list of calls, that begins at `start`, and where it ends.

    Args:
        text: Of the turn.
        start: Where the JSON begins.
        ends: What ends a call that cannot be read.
        **named: The name and the id, where they stand before the JSON, which is the arguments then.
    """
    try:
        value, stop = _value(text, start)
    except ValueError as error:
        end = ends.search(text, start)
        stop = end.start() if end else len(text)
        return [BadCall(text[start:stop].strip(), str(error))], stop
    if named:
        value = {"arguments": value, **named}
    found = value if isinstance(value, list) else [value]
    return [_as_call(each, text[start:stop]) for each in found], stop


def _read_marked(
    begins: re.Pattern[str], ends: re.Pattern[str], text: str, tools: Schemas = ()
) -> Calls:
    """Read the calls that stand behind a mark, also where what ends them is missing."""
    calls, stop = Calls(), 0
    while begin := begins.search(text, stop):
        named = {key: value for key, value in begin.groupdict().items() if value}
        found, stop = _read_at(text, begin.end(), ends, **named)
        calls += found
    return calls


_OBJECT = re.compile(r"""\{\s*["'](?:name|function|arguments|parameters|type|id)["']\s*:""")
_OBJECT_ENDS = re.compile(r"\n[ \t]*(?=[{`])")
_NAME = re.compile(r"""["'](?:name|function)["']\s*:""")
_GIVEN = re.compile(r"""["'](?:arguments|parameters)["']\s*:""")
_ALONE = {"name", "function", "type", "id"}


def _read_json(text: str, tools: Schemas = ()) -> Calls:
    """Read JSON objects that are calls, wherever they stand: in a fence, among words.

    An object is one if it has a name, and arguments or nothing else.
    """
    calls, stop = Calls(), 0
    while begin := _OBJECT.search(text, stop):
        found, stop = _read_at(text, begin.start(), _OBJECT_ENDS)
        written = text[begin.start() : stop]
        if isinstance(found[0], Call):
            calls += found if _GIVEN.search(written) or _value(written)[0].keys() <= _ALONE else []
        elif _NAME.search(written) and _GIVEN.search(written):
            calls += found
    return calls


def _read_llama(text: str, tools: Schemas = ()) -> Calls:
    """Read {"name": …, "parameters": {…}}, and know what stands behind <|python_tag|> for one."""
    calls = _read_json(text)
    if not calls and PYTHON_TAG in text:
        return [BadCall(text, f"What stands behind {PYTHON_TAG} is no JSON object. {FORM}")]
    return calls


def _read_pattern(pattern: re.Pattern[str], text: str, tools: Schemas = ()) -> Calls:
    calls = Calls()
    for match in pattern.finditer(text):
        groups = match.groupdict()
        try:
            if "name" not in groups:
                calls.append(_as_call(_value((match[1] or "").strip())[0], match[0]))
                continue
            name, given = groups.pop("name"), groups.pop("arguments", None)
            texts = {key: each for key, each in groups.items() if each is not None}
            calls.append(_as_call({"name": name, "arguments": given or texts}, match[0]))
        except ValueError as error:
            calls.append(BadCall(match[0], str(error)))
    return calls


def _read_python(text: str, tools: Schemas = ()) -> Calls:
    """Read name(arguments) of the tools that there are, wherever they stand.

    The arguments are Python's, by name or in order; what is no literal is the text itself, so that
    `calculator(3 + 4)` gives "3 + 4". Nothing between the parentheses is no call of a tool that
    needs something there: "use calculator() for sums".
    """
    functions = {f["name"]: f for f in (tool.get("function", tool) for tool in tools)}
    given = {name: f.get("parameters", {}) for name, f in functions.items()}
    names = {name: [*each.get("properties", {})] for name, each in given.items()}
    begins = re.compile(rf"\b({'|'.join(map(re.escape, names)) or '(?!)'})\(")
    calls, stop = Calls(), 0
    while begin := begins.search(text, stop):
        found, stop = _python_call(text, begin, names[begin[1]])
        if text[begin.end() :].lstrip()[:1] != ")" or not given[begin[1]].get("required"):
            calls.append(found)
    return calls


_CLOSER = re.compile(r"\)")


def _python_call(text: str, begin: re.Match[str], names: list[str]) -> tuple[Call | BadCall, int]:
    """Return the call whose arguments begin behind a match, and where it ends."""
    name, start = begin[1], begin.end()
    ends = [end.start() for end in islice(_CLOSER.finditer(text, start), CLOSERS)]
    for end in ends:
        given = _python_arguments(text[start:end], names)
        if given is not None:
            return Call(name, given), end + 1
    line = text.find("\n", start)
    stop = ends[0] if ends else len(text) if line < 0 else line
    written = text[start:stop].strip()
    if len(names) == 1 and written:  # whatever it is, it can only be that
        return Call(name, {names[0]: written}), stop
    told = f"The arguments of {name} cannot be read. Write {name}({', '.join(names)})."
    return BadCall(text[begin.start() : stop], told), stop


def _python_arguments(written: str, names: list[str]) -> dict[str, Any] | None:
    """Return the arguments of a call by their names; None: it is none, or there are too many."""
    whole = f"_({written})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what might be meant otherwise
            call: Any = ast.parse(whole, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call) or len(call.args) > len(names):
        return None
    given = [
        *zip(names, call.args, strict=False),
        *((each.arg, each.value) for each in call.keywords),
    ]
    if None in dict(given):  # **more
        return None
    return {name: _literal(value, whole) for name, value in given}


def _literal(node: ast.expr, whole: str) -> Any:
    """Return what a node of Python is as a value, or its text."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ast.get_source_segment(whole, node)


def _python(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_as_python(x)}' for key, x in arguments.items())})"


def _as_python(value: Any) -> str:
    return _json(value) if isinstance(value, str) else repr(value)


def _written(before: str, key: str, after: str) -> Callable[[str, Mapping[str, Any]], str]:
    return lambda name, arguments: f"{before}{_json({'name': name, key: dict(arguments)})}{after}"


_HERMES = re.compile(r"<tool_call>\s*(?:```\w*\s*)?"), re.compile(r"</?tool_call>")
"""<tool_call>{"name": …, "arguments": {…}}</tool_call>."""
_NAME_BEFORE = (
    r"(?:(?P<name>[\w.-]++)\s*+(?:\[CALL_ID\]\s*+(?P<id>\w++)\s*+)?(?:\[ARGS\]\s*+)?(?=\{))?"
)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*" + _NAME_BEFORE), re.compile(r"\[TOOL_CALLS\]")
"""[TOOL_CALLS][{"name": …, "arguments": {…}}], and later [TOOL_CALLS]name[ARGS]{…}."""
CALL_FORMATS: dict[str, CallFormat] = {
    "hermes": CallFormat(
        partial(_read_marked, *_HERMES),
        _written("<tool_call>\n", "arguments", "\n</tool_call>"),
        "<tool_call>",
    ),
    "mistral": CallFormat(
        partial(_read_marked, *_MISTRAL),
        _written("[TOOL_CALLS][", "arguments", "]"),
        "[TOOL_CALLS]",
    ),
    "llama3": CallFormat(_read_llama, _written("", "parameters", ""), PYTHON_TAG),
    "json": CallFormat(_read_json, _written("", "arguments", "")),
    "python": CallFormat(_read_python, _python),
}
"""Hermes and Qwen; Mistral; Llama 3; JSON as it is or in a fence; name(arguments), the shortest,
which small models learn first. What is more special comes first."""
