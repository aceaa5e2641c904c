"""Tool calls are read as they were written, and what cannot be read is told in words."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from trl.environments.calls import CALL_FORMATS, BadCall, Call, call_format, described

HALVES = st.characters() | st.characters(categories=["Cs"])  # half a character, too
texts = st.text(HALVES) | st.sampled_from(["</tool_call>", "[TOOL_CALLS]", '{"name": "x"}', "```"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[A-Za-z_][\w.-]{0,20}", fullmatch=True)
calls = st.builds(Call, names, st.dictionaries(texts, values, max_size=4))
in_python = st.builds(
    Call,
    st.from_regex(r"[A-Za-z]\w{0,9}_", fullmatch=True),
    st.dictionaries(st.from_regex(r"[a-z]{1,9}_", fullmatch=True), values, max_size=4),
)
CALLS = {name: in_python if name == "python" else calls for name in CALL_FORMATS}


def tools_of(*made):
    """Schemas of tools that take what they are called with."""
    taken = {}
    for each in made:
        taken[each.name] = taken.get(each.name, {}) | {key: {} for key in each.arguments}
    return [{"name": name, "parameters": {"properties": given}} for name, given in taken.items()]


GOOD = Call("add", {"a": 1, "b": 2})
TOOLS = [
    {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}},
    {"type": "function", "function": {"name": "calc", "parameters": {"properties": {"sum": {}}}}},
    {"name": "now"},
]
JSON = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


@pytest.mark.parametrize("name", CALL_FORMATS)
@properties
@given(data=st.data())
def test_what_is_written_is_read(name, data):
    form, wanted = CALL_FORMATS[name], data.draw(st.lists(CALLS[name], min_size=1, max_size=3))
    text = "Let me see.\n" + "\n".join(form.write(each.name, each.arguments) for each in wanted)
    assert form.read(text, tools_of(*wanted)) == wanted
    assert form.read(text + "\nSo be it.", tools_of(*wanted)) == wanted


@pytest.mark.parametrize("name", CALL_FORMATS)
@properties
@given(text=st.text(st.sampled_from('{}[]",: \n\\`0aé<>')) | texts, whole=calls)
def test_nothing_that_is_written_raises(name, text, whole):
    form = CALL_FORMATS[name]
    marked = [text, form.mark + text, form.mark + JSON[:-2] + text, text.join([JSON] * 2)]
    for each in [*marked, form.write(whole.name, whole.arguments)[:-3] + text]:
        found = form.read(each, tools_of(whole, GOOD))
        assert all(isinstance(call, Call) or (call.problem and call.text in each) for call in found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f"<tool_call>{JSON}</tool_call>"),
        ("hermes", f"I see.<tool_call>\n {JSON}"),  # ended too early
        ("hermes", f"<tool_call>\n```json\n{JSON}\n```\n</tool_call>"),
        ("hermes", f"<tool_call>[{JSON}]</tool_call>"),
        ("hermes", f"<tool_call>{JSON}}}</tool_call>"),  # one brace too many
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>',
        ),
        ("hermes", '<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>'),
        ("hermes", f'<tool_call>{{"type": "function", "function": {JSON}}}</tool_call>'),
        ("llama3", '{"name": "add", "parameters": {"a": 1, "b": 2}}'),
        (
            "llama3",
            '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a":1,"b":2}}',
        ),
        ("mistral", f"[TOOL_CALLS] [{JSON}]"),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'),
        ("mistral", '[TOOL_CALLS]add{"a": 1, "b": 2}'),
        ("json", f"Sure:\n```json\n{JSON}\n```\nDone."),
        ("json", f"I call {JSON}."),
        ("json", '{"arguments": {"a": 1, "b": 2}, "name": "add"}'),
    ],
)
def test_what_can_only_be_meant_so_is_read_so(name, text):
    assert CALL_FORMATS[name].read(text) == [GOOD]


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_turn_without_a_call_has_none(name):
    for text in (
        "",
        "The answer is 3.",
        '{"a": 1}',
        '{"name": "Bob", "age": 3}',
        "```py\nx = {}\n```",
    ):
        assert CALL_FORMATS[name].read(text) == []


def test_calls_of_tools_without_arguments_and_ids_are_read():
    text = '<tool_call>{"name": "say", "arguments": {"text": "a\nb"}}</tool_call>'  # as it is
    assert CALL_FORMATS["hermes"].read(text) == [Call("say", {"text": "a\nb"})]
    assert CALL_FORMATS["json"].read('{"name": "look"}') == [Call("look", {})]
    assert CALL_FORMATS["json"].read('{"name": "look", "arguments": null}') == [Call("look", {})]
    assert CALL_FORMATS["hermes"].read("<tool_call>[]</tool_call>") == []  # as SmolLM2 says none
    text = f'[TOOL_CALLS][{JSON[:-1]}, "id": "abcdefgh9"}}]'
    assert CALL_FORMATS["mistral"].read(text) == [Call("add", GOOD.arguments, "abcdefgh9")]
    text = '[TOOL_CALLS]look[CALL_ID]abcdefgh9[ARGS]{}[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'
    assert CALL_FORMATS["mistral"].read(text) == [Call("look", {}, "abcdefgh9"), GOOD]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "hermes",
            "<tool_call>add(1, 2)</tool_call>",
            "no valid JSON (Expecting value, at character 1",
        ),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}', "no valid JSON"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1,}}', "no valid JSON"),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>', "does not name its tool"),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', "does not name its tool"),
        ("hermes", '<tool_call>"add"</tool_call>', "must be a JSON object"),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
            '"arguments" of add',
        ),
        ("hermes", '<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "no valid JSON"),
        ("hermes", f"<tool_call>{'[' * 100_000}", "nested too deeply"),
        ("hermes", f'<tool_call>{{"name": "add", "arguments": {"1" * 5000}', "number in the call"),
        ("llama3", "<|python_tag|>print(3)", "is no JSON object"),
        ("mistral", "[TOOL_CALLS]add(1)", "no valid JSON"),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": }', "no valid JSON"),
        ("json", "{'name': 'add', 'arguments': {'a': 1}}", "enclosed in double quotes"),
        ("json", '```json\n{"name": "add", "arguments": {"a": 1}\n```', "no valid JSON"),
    ],
)
def test_what_looks_like_a_call_and_is_none_is_told(name, text, problem):
    (found,) = CALL_FORMATS[name].read(text)
    assert isinstance(found, BadCall)
    assert problem in found.problem
    assert found.text in text


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_long_turns_take_no_long_time(name):
    form, begun = CALL_FORMATS[name], time.process_time()
    hostile = [
        "[",
        "{",
        '{"a":',
        '{"name":',
        '{"name": "a", "arguments": ',
        '"',
        "\\",
        " ",
        "\n",
        "1",
        "add(",
        "add(\n",
        "add('",
        "add(1, a=b(",
        "add(((1) + [",
        "add)",
    ]
    for text in [*hostile, *(form.mark + each for each in hostile), JSON + "\n", form.mark + JSON]:
        form.read(text * 1000, TOOLS)
        form.read(f"{form.mark}a{text * 1000}", TOOLS)
        form.read(form.mark + text * 1000, TOOLS)
    call = form.write("add", {"a": 1})
    one = (call if call.startswith(form.mark) else form.mark + call) + "\n"
    assert len(form.read(one * 2000, TOOLS)) == 2000
    assert time.process_time() - begun < 30  # a second here; minutes if it were quadratic


def test_a_regular_expression_of_ones_own_reads_calls():
    named = call_format(r"(?P<name>\w+)\((?P<arguments>\{.*?\})\)")
    assert named.read('I call add({"a": 1, "b": 2}).') == [GOOD]
    assert "no valid JSON" in named.read("add({a})")[0].problem
    given = call_format(r"<(?P<name>calc)>(?P<expression>.*?)(?:\|(?P<base>\d+))?</calc>")
    assert given.read("<calc>1\n+ 2</calc>") == [Call("calc", {"expression": "1\n+ 2"})]
    assert given.read("<calc>1|8</calc>")[0].arguments == {"expression": "1", "base": "8"}
    single = call_format(r"ACTION:(.*?)$")
    assert single.read(f"ACTION: {JSON}") == [GOOD]
    assert isinstance(single.read("ACTION: 3")[0], BadCall)
    assert isinstance(single.read("ACTION:")[0], BadCall)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("add(1, 2)", [GOOD]),
        ("I use add(b=2, a=1).", [GOOD]),
        ("add(1, b=2) and add(1, 2", [GOOD, None]),  # the second is cut
        ("calc(35 + 148)", [Call("calc", {"sum": "35 + 148"})]),  # no literal: as it is written
        ("calc(sum=(3 + 4) * 2)", [Call("calc", {"sum": "(3 + 4) * 2"})]),
        ('calc("3 + 4") = 7 (sure)', [Call("calc", {"sum": "3 + 4"})]),
        ("calc(':)') calc(-3)", [Call("calc", {"sum": ":)"}), Call("calc", {"sum": -3})]),
        ("calc(3 apples)", [Call("calc", {"sum": "3 apples"})]),
        ("calc(35 + 148", [Call("calc", {"sum": "35 + 148"})]),
        ("calc(1, 2)\nSo.", [Call("calc", {"sum": "1, 2"})]),
        ("now()", [Call("now", {})]),
        ("add(a b)", [None]),
        ("add(**x)", [None]),
        ("add(1, 2, 3)", [None]),
        ("recalc(3), other(3), add (3)", []),
        ("calc(\x00)", [Call("calc", {"sum": "\x00"})]),
        (f"calc({'(' * 500}{')' * 500})", [Call("calc", {"sum": "(" * 500})]),
    ],
)
def test_calls_as_in_python(text, wanted):
    found = CALL_FORMATS["python"].read(text, TOOLS)
    assert [None if isinstance(each, BadCall) else each for each in found] == wanted
    for each in found:
        assert isinstance(each, Call) or ("Write add(a, b)." in each.problem and each.text in text)


def test_a_tool_that_is_only_spoken_of_is_not_called():
    parameters = {"properties": {"word": {}, "times": {}}, "required": ["word"]}
    tools = [{"name": "look_up", "parameters": parameters}, {"name": "now"}]
    found = CALL_FORMATS["python"].read("I use look_up( ), then look_up(x) and now().", tools)
    assert found == [Call("look_up", {"word": "x"}), Call("now", {})]
    tools[0]["parameters"] = parameters | {"required": []}
    assert len(CALL_FORMATS["python"].read("look_up()", tools)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("herms", r"`call_format` must be one of \['hermes', .* got 'herms' Did you mean `hermes`"),
        ("(", "`call_format` must be one of .*missing"),
        ("<(?P<tool>.*)>", "name the groups"),
    ],
)
def test_what_is_no_format_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        call_format(given)
    with pytest.raises(TypeError, match="`call_format` must be a text, got 3"):
        call_format(3)


def test_tools_are_described_with_an_example_that_can_be_read():
    properties = {
        "a": {"type": "integer"},
        "unit": {"enum": ["km", "m"]},
        "text": {"type": "string"},
    }
    function = {"name": "add", "description": "Adds.", "parameters": {"properties": properties}}
    schema = {"type": "function", "function": function}
    for form in CALL_FORMATS.values():
        text = described([schema, schema], form)
        assert text.count(json.dumps(function)) == 2
        called = form.read(text, [schema])
        assert Call("add", {"a": 1, "unit": "km", "text": "..."}) in called
    assert "example" not in described([schema], call_format("(a)"))
