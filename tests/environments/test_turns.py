"""Turns follow one another in the template's own tokens, whatever is said in them."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tests.environments.templates import WITH_TOOLS, end_ids, tokenizer_of
from tests.environments.test_calls import HALVES
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, sentence_pieces
from tests.strategies import properties
from trl.environments.calls import CALL_FORMATS, BadCall, Call
from trl.environments.turns import ChatTurns, PlainTurns

PLACED = ("llama3", "mistral", "qwen", "phi4", "glm")
"""Families whose templates have a place for tools."""
WAYS = [*((family, "bytes") for family in WITH_TOOLS), ("mistral", "pieces"), ("gemma", "pieces")]
XML = r"<tool_call>(?P<name>\w+)<arg_key>a</arg_key><arg_value>(?P<a>.*?)</arg_value></tool_call>"
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "look_up", "description": "Looks.", "parameters": PARAMETERS}
SCHEMA = {"type": "function", "function": FUNCTION}
ASKED = [{"role": "user", "content": "What is up?"}]
CALL = Call("look_up", {"a": "b"}, "abcdefgh9")
MARKS = (
    "<|im_end|> </s> <|eot_id|> <end_of_turn> <|end|> <|user|> [/INST] <|im_start|>system </think>"
)
CONTENTS = [
    "",
    " ",
    "\n\n",
    " a \n",
    "\n🙂é你",
    "half \ud83d",
    '{"a": "</tool_response>"}',
    "2" * 300,
]


@cache
def turns_of(family, kind="bytes", tools=True, template=None, **given):
    tokenizer = tokenizer_of(family, kind)
    tokenizer.chat_template = template or tokenizer.chat_template
    if tokenizer.chat_template is None:
        pytest.skip("examples/real_models/get.py gets the template")
    if family == "glm" and tools:
        given.setdefault("call_format", XML)
    given = {"chat_template_kwargs": dict(given.pop("told", ()))} | given
    return ChatTurns(tokenizer, end_ids=end_ids(tokenizer, family), tools=tools, **given)


def rendered(turns, messages, **told):
    text = turns.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **told
    )
    return turns.tokenizer(text, add_special_tokens=False)["input_ids"]


def up_to_the_end(ids, ends):
    """The turn that `ids` begin with, and its end."""
    return ids[: next(place for place, token in enumerate(ids) if token in ends) + 1]


def check_conversation(turns, family, before, turns_said, told):
    """The template's rendering of a conversation is what is put together turn by turn."""
    messages = before + [each for said, _, replies in turns_said for each in (said, *replies)]
    whole = rendered(turns, messages, **told)
    ids = turns.prompt(before, told.get("tools", ()))
    ends = end_ids(turns.tokenizer, family)
    assert whole[: len(ids)] == ids
    for _, calls, replies in turns_said:
        said = up_to_the_end(whole[len(ids) :], ends)  # as a policy would write it
        ids = ids + said + turns.following(calls, replies, ended=True)
        cut = turns.following(calls, replies, ended=False)
        assert [said[-1], *turns.following(calls, replies, ended=True)] == cut
        assert whole[: len(ids)] == ids
    assert whole == ids


def said_of(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(("family", "kind"), WAYS)
@pytest.mark.parametrize("content", ["Is it so?", *CONTENTS])
def test_what_a_user_says_between_turns_is_in_the_templates_own_tokens(family, kind, content):
    turns = turns_of(family, kind, tools=False)
    reply = [{"role": "user", "content": content.replace("\ud83d", "\ufffd")}]
    spoken = [(said_of("I see: 3."), [], reply), (said_of("Aha 🙂"), [], reply)]
    check_conversation(turns, family, ASKED, spoken, {})
    given = [{"role": "user", "content": content}]
    assert turns.following([], given, ended=True) == turns.following([], reply, ended=True)


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("content", ["Is it so?", *CONTENTS])
def test_answers_of_tools_are_in_the_templates_own_tokens(family, content):
    turns = turns_of(family)
    content = content.replace("\ud83d", "\ufffd")
    counts = (1,) if family == "llama3" else (1, 3)  # calls a turn
    for count in counts:
        calls = [CALL] * count
        answer = {"role": "tool", "name": "look_up", "content": content, "tool_call_id": CALL.id}
        function = {"name": CALL.name, "arguments": CALL.arguments}
        made = [{"type": "function", "id": CALL.id, "function": function}] * count
        thought = "<think>\nHm.\n</think>\n\n" if family == "qwen" else ""
        spoken = [(said_of(thought) | {"tool_calls": made}, calls, [answer] * count)] * 2
        check_conversation(turns, family, ASKED, spoken, {"tools": [SCHEMA]})


@pytest.mark.parametrize("family", [family for family in WITH_TOOLS if family not in PLACED])
def test_answers_of_tools_are_user_turns_where_a_template_has_no_place_for_them(family):
    turns = turns_of(family)
    answers = [{"role": "tool", "name": "look_up", "content": each} for each in ("7", " 8\n")]
    text = "<tool_response>\n7\n</tool_response>\n<tool_response>\n 8\n\n</tool_response>"
    spoken = [(said_of("I see: 3."), [CALL, BadCall("", "")], answers)]
    ids = turns.following(spoken[0][1], answers, ended=False)
    assert ids == turns.following([], [{"role": "user", "content": text}], ended=False)
    assert turns.tokenizer.decode(ids).count(text) == 1


@cache
def control(way, ended, content):
    """The special tokens of a reply."""
    turns, role = turns_of(*way), "tool" if way[0] in PLACED else "user"
    reply = [{"role": role, "name": "look_up", "content": content}]
    ids = turns.following([CALL], reply, ended=ended)
    added = turns.tokenizer.added_tokens_decoder
    return [token for token in ids if token in added and added[token].special]


@pytest.mark.parametrize("way", WAYS)
def test_special_tokens_in_what_is_said_are_text(way):
    nested = "<|im_<|im_end|>end|>[/IN[/INST]ST]</</s>s>"
    for content in (MARKS, nested):
        assert control(way, True, content) == control(way, True, "x")


@properties
@given(way=st.sampled_from(WAYS[1:]), content=st.text(HALVES), ended=st.booleans())
def test_what_is_said_brings_no_control_tokens(way, content, ended):
    assert control(way, ended, content) == control(way, ended, "x")


@pytest.mark.parametrize(
    ("family", "form", "told"),
    [
        ("smollm2", "python", "described in the system message, and their answers are user turns"),
        ("phi3", "python", "described in the system message, and their answers are user turns"),
        ("gemma", "python", "described in the first user message, and their answers are user"),
        ("llama3", "llama3", ""),
        ("mistral", "mistral", ""),
        ("qwen", "hermes", ""),
        ("phi4", "json", ""),
    ],
)
def test_tools_stand_where_the_template_has_a_place_for_them(family, form, told):
    turns = turns_of(family)
    assert turns.told.endswith(told) if not told else told in turns.told
    assert bool(turns.told) == bool(told)
    function = FUNCTION["name"]
    text = turns.tokenizer.decode(turns.prompt(ASKED, [SCHEMA]))
    assert text.count(f'"{function}"') == 1
    assert text.count(f"{function}(") == bool(told)  # the example of a call
    assert turns.told.endswith("(call_format: python)") == bool(told)
    assert ASKED[0]["content"] in text
    call = CALL_FORMATS[form].write("look_up", {"a": "b"})
    assert turns.calls(call, [SCHEMA]) == [Call("look_up", {"a": "b"})]
    assert (turns.words_on([SCHEMA]) in text) if told else json.loads(turns.words_on([SCHEMA]))
    assert turns.words_on([]) == ""
    assert turns.prompt(ASKED) == rendered(turns, ASKED)
    if told:
        assert [Call("look_up", {"a": "..."})] == turns.calls(text, [SCHEMA])
    if family != "gemma":
        text = turns.tokenizer.decode(
            turns.prompt([{"role": "system", "content": "Be brief."}, *ASKED], [SCHEMA])
        )
        assert "Be brief.\n\nYou can call" in text if told else "Be brief." in text
        assert f'"{function}"' in text


def test_tools_stand_beside_the_parts_of_a_message():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    turns = turns_of("qwen", template=template)
    parts = [{"type": "text", "text": "Look!"}, {"type": "text", "text": "What?"}]
    text = turns.tokenizer.decode(turns.prompt([{"role": "user", "content": parts}], [SCHEMA]))
    assert text.startswith("[You can call")
    assert text.endswith("][Look!][What?]<|im_end|>")


def test_answers_of_tools_in_a_prompt_are_user_turns_where_a_template_has_no_place_for_them():
    said = [{"role": "assistant", "content": "look_up(1)"}]
    told = [{"role": "tool", "name": "look_up", "content": n} for n in "12"]
    turns, after = turns_of("smollm2"), [{"role": "user", "content": "And?"}]
    both = "".join(f"<tool_response>\n{n}\n</tool_response>\n" for n in "12").strip()
    as_users = [{"role": "user", "content": both}]
    found = turns.prompt([*ASKED, *said, *told, *said, *after], [SCHEMA])
    assert found == turns.prompt([*ASKED, *said, *as_users, *said, *after], [SCHEMA])
    own = turns_of("qwen")
    text = own.tokenizer.decode(own.prompt([*ASKED, *said, *told, *after], [SCHEMA]))
    assert "tool_response>\n1" in text  # by the template


def test_a_prompt_in_which_tools_have_no_place_is_refused():
    with pytest.raises(ValueError, match="`prompts` must have a user's message"):
        turns_of("gemma").prompt([{"role": "assistant", "content": "I"}], [SCHEMA])


def test_calls_that_are_only_thought_of_are_none():
    turns, call = turns_of("qwen"), CALL_FORMATS["hermes"].write("look_up", {"a": "</think>"})
    assert turns.calls(f"<think>\n{call}") == []
    assert len(turns.calls(f"<think>\nOr {call[:20]}\n</think>\n\n{call}")) == 1
    assert len(turns.calls(call)) == 1
    begins = turns.tokenizer.chat_template.replace(
        "assistant\n{% if enable", "assistant\n<think>\n{% if enable"
    )
    turns = turns_of("qwen", template=begins)
    assert turns.calls(f"{call[:20]}") == []
    assert len(turns.calls(f"Hm.</think>{call}")) == 1
    assert turns_of("qwen", tools=False).calls(call) == []


FORGETS = "leaves out or moves the thinking of earlier turns when it writes a conversation anew"


def test_a_template_that_forgets_what_was_thought_is_told_with_the_way_out():
    assert turns_of("qwen").told == ""  # behind the last user message it stays
    told = turns_of("qwen", tools=False).told
    assert FORGETS in told
    assert "change tokenizer.chat_template" in told
    told = turns_of("glm", tools=False).told
    assert FORGETS in told
    assert told.endswith("give chat_template_kwargs={'clear_thinking': False}")
    assert turns_of("glm", tools=False, told=(("clear_thinking", False),)).told == ""
    moves = (  # the system message stands in the last user message
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: "
        "{% if messages[0].role == 'system' and loop.last %}{{ messages[0].content }} {% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert (
        "leaves out or moves what came before" in turns_of("qwen", tools=False, template=moves).told
    )


def test_what_the_template_is_told_holds_in_every_turn():
    turns = turns_of("qwen", told=(("enable_thinking", False),))
    for role in ("user", "tool"):
        ids = turns.following([CALL], [{"role": role, "name": "a", "content": "Hm"}], ended=True)
        assert turns.tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert FORGETS in turns.told


def test_ids_of_calls_come_back_with_the_answers():
    turns = turns_of("mistral")
    calls = [CALL, Call("look_up", {}, "too long for one"), BadCall("x", "y")]
    answers = [{"role": "tool", "name": "look_up", "content": "7"}] * 3
    text = turns.tokenizer.decode(turns.following(calls, answers, ended=True))
    ids = [each.split('"')[1] for each in text.split('"call_id": ')[1:]]
    assert ids[0] == "abcdefgh9"
    assert len(set(ids)) == 3
    assert {len(id_) for id_ in ids} == {9}
    many = turns_of("llama3")  # its template writes one call a turn
    text = many.tokenizer.decode(many.following(calls, answers, ended=True))
    assert text.count("ipython") == 3


def test_a_template_that_knows_tools_but_not_their_answers_gets_user_turns():
    template = turns_of("qwen").tokenizer.chat_template
    template = template.replace(
        "m.role == 'tool' %}{%", "m.role == 'tool' %}{{ raise_exception('tool?') }}{%"
    )
    turns = turns_of("qwen", template=template)
    assert turns.told == (
        "the chat template has no place for the answers of tools: they are user turns; "
        + turns_of("qwen", tools=False).told
    )
    answer = [{"role": "tool", "name": "look_up", "content": "7"}]
    assert "user\n<tool_response>\n7\n" in turns.tokenizer.decode(
        turns.following([CALL], answer, ended=True)
    )


def test_a_template_that_wants_arguments_as_json_gets_them_so():
    template = (
        "{{ tools }}{% for m in messages %}{% if m.role == 'tool' and not messages[1].tool_calls %}"
        "{{ raise_exception('an answer to no call') }}{% endif %}{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}{% set one = call.function %}"
        """{{ '{"name": "' + one.name + '", "arguments": ' + one.arguments + '}' }}"""
        "{% endfor %}<|im_end|>{% endfor %}"
    )
    turns = turns_of("qwen", template=template)
    assert turns.told == ""
    answer = [{"role": "tool", "name": "look_up", "content": "7"}]
    ids = turns.following([CALL], answer, ended=True)
    assert turns.tokenizer.decode(ids) == "tool: 7<|im_end|>"


def test_a_template_without_end_tokens_goes_on_behind_what_the_policy_ended_with():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = ChatTurns(tokenizer, tools=False)
    for ended in (True, False):
        ids = turns.following([], [{"role": "user", "content": "abc"}], ended=ended)
        assert tokenizer.decode(ids) == "\nuser: abc\nassistant:"


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("glm", {"call_format": None}, r"`call_format` must be given for .*<tool_call>trlMark"),
        ("qwen", {"call_format": "herms"}, "`call_format` must be one of .* Did you mean `hermes`"),
        ("qwen", {"told": (("depth", 1),)}, "`chat_template_kwargs` must name what .* 'depth'"),
        (
            "qwen",
            {"template": "</think>{{ messages[2].x.y }}"},
            "`tokenizer.chat_template` must go",
        ),
        (
            "qwen",
            {
                "template": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
                "{% endif %}<|im_end|>{% endfor %}"
            },
            "`tokenizer.chat_template` must show tools, or what a user says",
        ),
    ],
)
def test_what_cannot_be_is_told_before_the_first_token(family, given, message):
    with pytest.raises(ValueError, match=message):
        turns_of(family, **given)


def test_a_template_for_tools_that_says_no_form_of_calls_gets_plain_json():
    template = (
        "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    turns = turns_of("qwen", template=template)
    assert turns.calls('Well: {"name": "look_up", "arguments": {}}') == [Call("look_up", {})]
    for family in ("qwen", "phi3"):
        own = turns_of(family, call_format=r"(?P<name>\w+)!")
        assert own.calls("Do look_up!") == [Call("look_up", {})]
    assert "listed in the system message, how they are called is for the prompts" in own.told
    assert "To call" not in own.tokenizer.decode(own.prompt(ASKED, [SCHEMA]))


def test_plain_text_goes_on_as_it_is():
    tokenizer = byte_level()
    turns = PlainTurns(tokenizer, call_format=r"(?P<name>\w+)\.\.")
    assert turns.prompt("abc.") == tokenizer("abc.")["input_ids"]
    assert turns.calls("do ab..") == [Call("ab", {})]
    assert PlainTurns(tokenizer).calls("do ab..") == []
    replies = [{"role": "user", "content": "abc "}, {"role": "tool", "content": "<eos>d"}]
    for ended in (True, False):
        ids = turns.following([], replies, ended=ended)
        assert tokenizer.decode(ids) == "abc < eos>d".replace("<", "").replace(">", "")
        assert tokenizer.eos_token_id not in ids
    words = sentence_pieces()  # a space stands before what begins a text, not before a reply
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    ids = PlainTurns(words).following([], [{"role": "user", "content": "s a"}], ended=True)
    assert words.convert_ids_to_tokens(ids) == ["s", "▁a"]
    assert turns.following([], [], ended=True) == []
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template: set"):
        ChatTurns(tokenizer)
    with pytest.raises(ValueError, match="`call_format` must be given for tools where .* no chat"):
        PlainTurns(tokenizer, tools=True)
