"""How turns follow one another in tokens: by a chat template, or as plain text.

What the policy has written stays as it is: nothing is decoded and encoded again. Only what comes
between two of its turns is written here, and a chat template says how: a small conversation is
rendered with the reply at its end, and what stands behind the policy's part of it is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, product
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl.config.errors import refuse
from trl.environments.calls import CALL_FORMATS, BadCall, Call, CallFormat, Schemas, described
from trl.environments.calls import call_format as format_named
from trl.rollout.queries import HELLO, NO_TEMPLATE, check_template_kwargs, encode_queries

Messages = Sequence[Mapping[str, Any]]

SAID, ANSWER, MARK = "trlSaid", "trlAnswer", "trlMark"
"""What is looked for in a rendered conversation: of the policy, of a reply, of what is before."""
PROBE = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": PROBE}]
REPLY = {"role": "tool", "name": MARK, "content": ANSWER, "tool_call_id": "call00000"}
WITHOUT_PLACE = "python"
"""The call format where a template knows of no tools: such models have not been trained on JSON.

Shown one call, SmolLM2-135M-Instruct writes that of another sum in 6 of 32 answers so, in none as
Hermes has it."""


class ChatTurns:
    """How turns follow one another by a chat template.

    What the template can do is found out here, by rendering small conversations, not by its name.

    Special tokens in what a tool or a user writes do not become control tokens: a space behind
    their first character makes text of them, which the model reads as such.

    Args:
        tokenizer: With a chat template.
        call_format: See `trl.environments.calls.call_format`; None: that of the template, and
            "python" for one that has no place for tools.
        chat_template_kwargs: What the chat template is told besides, in every turn.
        end_ids: The tokens that end a turn of the policy; none: the special tokens.
        tools: Whether there are tools.

    Attributes:
        told: What a user should know: where tools stand if the template has no place for them, and
            what it forgets of earlier turns; empty: nothing.

    Raises:
        ValueError: if the template cannot write what is needed, naming why.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        call_format: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        end_ids: Sequence[int] = (),
        tools: bool = True,
    ) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            refuse("tokenizer", "have a chat template", fix=NO_TEMPLATE)
        check_template_kwargs(tokenizer, chat_template_kwargs)
        self.tokenizer, self._kwargs = tokenizer, dict(chat_template_kwargs or {})
        self._template, self._control = str(tokenizer.chat_template), _Control(tokenizer, end_ids)
        self._thinks = "</think>" in self._template
        self._in_system = self._shows(MARK, [{"role": "system", "content": MARK}, *HELLO])
        self._in_template = tools and self._shows(MARK, HELLO, tools=TOOLS)
        self._has_answers = self._in_template and self._writes_answers()
        self._form = self._format(call_format) if tools else None
        self._chosen = "" if call_format else f" (call_format: {WITHOUT_PLACE})"
        reply = REPLY if self._has_answers else {"role": "user", "content": ANSWER}
        self._after([], [reply])  # raises where nothing can follow
        user = {"role": "user", "content": MARK}
        if tools and not (self._in_template or self._in_system or self._shows(MARK, [user])):
            rule, fix = "show tools, or what a user says", "give a template that writes it"
            refuse("tokenizer.chat_template", rule, self._template, fix)
        self._begins_thinking = self._thinks and self._render(HELLO).rstrip().endswith("<think>")
        told = [self._where() if tools else "", self._forgotten(reply)]
        self.told = "; ".join(filter(None, told))

    def prompt(self, messages: Messages, schemas: Schemas = ()) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant begins to speak.

        Args:
            messages: {"role": …, "content": …}.
            schemas: Of the tools; the template places them, or they are described in the system
                message, or at the head of the first user message.
        """
        chat = [dict(message) for message in self._with_users(messages)]
        told = dict(self._kwargs)
        roles = [message["role"] for message in chat]
        if schemas and self._in_template:
            told["tools"] = list(schemas)
        elif text := self.words_on(schemas):
            if self._in_system and roles[0] != "system":
                chat.insert(0, {"role": "system", "content": text})
            elif self._in_system:
                chat[0]["content"] = _joined(chat[0]["content"], text)
            elif "user" in roles:
                first = chat[roles.index("user")]
                first["content"] = _joined(text, first["content"])
            else:
                refuse("prompts", "have a user's message, which tools are described in", roles)
        (row,) = encode_queries([chat], self.tokenizer, chat_template_kwargs=told).rows
        return row.tolist()

    def words_on(self, schemas: Schemas) -> str:
        """Return what the model is told of its tools: the schemas, or what describes them."""
        if self._in_template:
            return "\n".join(map(json.dumps, schemas))
        return described(schemas, self._form) if schemas and self._form else ""

    def calls(self, text: str, schemas: Schemas = ()) -> list[Call | BadCall]:
        """Return the calls in a turn; those that the model only thinks of are none.

        Args:
            text: The turn with its special tokens, but for that which ends it.
            schemas: Of the tools that there are.
        """
        if self._form is None:
            return []
        if self._begins_thinking or (self._thinks and text.lstrip().startswith("<think>")):
            text = text.partition("</think>")[2]
        return self._form.read(text, schemas)

    def following(
        self, calls: Sequence[Call | BadCall], messages: Messages, *, ended: bool
    ) -> list[int]:
        """Return the token ids between the policy's last token and the first of its next turn.

        Args:
            calls: Of the policy's turn.
            messages: What follows it: {"role": "tool", "name": …, "content": …} for each call, in
                their order, or {"role": "user", "content": …}.
            ended: Whether the policy has written the token that ends its turn; else it comes first.
        """
        replies = [
            {key: self._control.harmless(value) for key, value in message.items()}
            for message in messages
        ]
        replies = self._with_users(replies)
        return self._control.encode(*self._after(calls, replies), ended)

    def _with_users(self, messages: Messages) -> Messages:
        """Return messages with the answers of tools as turns of the user, if they have no place."""
        if self._has_answers:
            return messages
        found = list[Mapping[str, Any]]()
        for of_tools, some in groupby(messages, key=lambda message: message["role"] == "tool"):
            if of_tools:
                texts = [f"<tool_response>\n{each['content']}\n</tool_response>" for each in some]
                some = iter([{"role": "user", "content": "\n".join(texts)}])
            found += some
        return found

    # -- what the template writes ------------------------------------------------------------------

    def _render(self, messages: Messages, **told: Any) -> str:
        how = {"add_generation_prompt": True} | self._kwargs | told
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **how))

    def _shows(self, text: str, messages: Messages, **told: Any) -> bool:
        try:
            return text in self._render(messages, **told)
        except Exception:  # whatever a template raises
            return False

    def _after(self, calls: Sequence[Call | BadCall], replies: Messages) -> tuple[str, str]:
        """Return what ends a turn of the policy, and what follows up to its next turn.

        Raises:
            ValueError: if the template cannot write it.
        """
        replies = [
            {**reply, "tool_call_id": _id(calls, place)} if reply["role"] == "tool" else reply
            for place, reply in enumerate(replies)
        ]
        answers = [reply for reply in replies if reply["role"] == "tool"]
        told = {"tools": TOOLS} if answers else {}  # some have a template for each
        problem = "it leaves out what the assistant says"
        for turn in _spoken(answers):
            try:
                text = self._render([*HELLO, turn, *replies], **told)
            except Exception as error:  # whatever a template raises
                problem = str(error)
                continue
            _, said, rest = text.partition(SAID)
            end = self._control.first_end(rest)
            if end or (said and "tool_calls" not in turn):
                return end, rest.partition(end)[2] if end else rest
        fix = "change it so that messages may follow a turn of the assistant"
        refuse("tokenizer.chat_template", "go on with a conversation", problem, fix)

    def _writes_answers(self) -> bool:
        try:
            return ANSWER in self._after([], [REPLY])[1]
        except ValueError:
            return False

    def _format(self, name: str | None) -> CallFormat:
        """Return the call format of that name, or the one that the template writes."""
        if name is not None or not self._in_template:
            return format_named(WITHOUT_PLACE if name is None else name)
        forms = [form for form in CALL_FORMATS.values() if form.mark in self._template]
        for turn in _spoken([REPLY]):
            chat = [*HELLO, turn]
            if "tool_calls" not in turn or not self._shows(SAID, chat, tools=TOOLS):
                continue
            text = self._render(chat, tools=TOOLS, add_generation_prompt=False)
            text = text.rpartition(HELLO[0]["content"])[2]
            for form in forms:
                if any(
                    isinstance(c, Call) and "said" in c.arguments for c in form.read(text, TOOLS)
                ):
                    return form
            rule = "be given for a chat template that writes calls in a form of its own"
            refuse("call_format", rule, text, "give a regular expression that reads them")
        return forms[0]

    def _where(self) -> str:
        """Return where tools and their answers stand, if it is not where the template says."""
        if self._in_template and self._has_answers:
            return ""
        if self._in_template:
            return "the chat template has no place for the answers of tools: they are user turns"
        place = "the system message" if self._in_system else "the first user message"
        how = f"they and how they are called are described in {place}"
        if self._form and not self._form.write:
            how = f"they are listed in {place}, how they are called is for the prompts to show"
        how += f", and their answers are user turns{self._chosen}"
        return f"the chat template has no place for tools: {how}"

    def _forgotten(self, reply: Mapping[str, Any]) -> str:
        """Return what to say of a template that writes earlier turns otherwise than they were."""
        if self._keeps(reply):
            return ""
        fix = "change tokenizer.chat_template so that it writes them as they were"
        names = re.findall(r"\b\w*(?:think|reason)\w*(?= is (?:not )?defined)", self._template)
        for name, value in product(dict.fromkeys(names), (False, True)):
            if self._keeps(reply, **{name: value}):
                fix = f"give chat_template_kwargs={{{name!r}: {value}}}"
        what = "the thinking of earlier turns" if self._thinks else "what came before"
        return (
            f"the chat template leaves out or moves {what} when it writes a conversation anew; "
            f"here it stays, in sampling as in training: to use the model in the same way, {fix}"
        )

    def _keeps(self, reply: Mapping[str, Any], **told: Any) -> bool:
        """Return whether a conversation still begins as it did when there is a reply."""
        before = [{"role": "system", "content": MARK}] * self._in_system + HELLO
        answers = [reply] if reply["role"] == "tool" else []
        told |= {"tools": TOOLS} if answers else {}
        for turn in _spoken(answers):
            try:
                opening = self._render(before, **told).rstrip()
                thinks = self._thinks and not opening.endswith("</think>")
                turn["content"] = f"<think>\n{MARK}\n</think>\n\n" * thinks + turn["content"]
                whole = self._render([*before, turn, reply], **told)
            except Exception:  # whatever a template raises
                continue
            begun = opening.removesuffix("<think>") + turn["content"]
            return "".join(whole.split()).startswith("".join(begun.split()))
        return True


class PlainTurns:
    """How turns follow one another as plain text: what is answered is written as it is.

    Args:
        tokenizer: Without chat template, or for prompts that do not go through it.
        call_format: See `trl.environments.calls.call_format`; None: there are no calls.
        tools: Whether there are tools: prompts have to show them, and `call_format` is needed.
    """

    told = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        call_format: str | None = None,
        tools: bool = False,
    ) -> None:
        if tools and call_format is None:
            rule = "be given for tools where there is no chat template"
            fix = f"give one of {list(CALL_FORMATS)}, and show in the prompts how tools are called"
            refuse("call_format", rule, "None", f"{fix}; or {NO_TEMPLATE}")
        self.tokenizer, self._control = tokenizer, _Control(tokenizer, ())
        self._form = None if call_format is None else format_named(call_format)

    def prompt(self, text: str, schemas: Schemas = ()) -> list[int]:
        """Return the token ids of a prompt, which has to show the tools itself."""
        (row,) = encode_queries([text], self.tokenizer).rows
        return row.tolist()

    def words_on(self, schemas: Schemas) -> str:
        """Return nothing: the prompts show the tools."""
        return ""

    def calls(self, text: str, schemas: Schemas = ()) -> list[Call | BadCall]:
        """Return the calls in a turn, of the tools that there are."""
        return self._form.read(text, schemas) if self._form else []

    def following(
        self, calls: Sequence[Call | BadCall], messages: Messages, *, ended: bool
    ) -> list[int]:
        """Return the token ids of the messages' texts, one after another; see `ChatTurns`."""
        text = "".join(self._control.harmless(message["content"]) for message in messages)
        return self._control.encode("", text, ended)


class _Control:
    """The special tokens of a tokenizer, as texts.

    Args:
        tokenizer: Of the policy.
        end_ids: The tokens that end a turn; none: all that are special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        added = tokenizer.added_tokens_decoder
        special = [str(token) for token in added.values() if token.special]
        marks = [str(t) for t in added.values() if re.fullmatch(r"<\S+>|\[\S+\]", str(t))]
        self._tokenizer, self._anchor = tokenizer, str(tokenizer.eos_token or "")
        self._end = _any_of([str(added[end]) for end in end_ids if end in added] or special)
        self._control = _any_of([text for text in special + marks if len(text) > 1])

    def harmless(self, text: Any) -> str:
        """Return a text in which no special token is one, and halves of characters are no more."""
        whole = re.sub("[\ud800-\udfff]", "\ufffd", str(text))
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", whole)

    def first_end(self, text: str) -> str:
        """Return the first token of a text that ends a turn; empty: there is none."""
        found = self._end.search(text)
        return found[0] if found else ""

    def encode(self, end: str, text: str, ended: bool) -> list[int]:
        """Return the token ids of what follows a turn.

        They are those of the text behind a special token: a tokenizer may put a space before what
        begins a text, and merges nothing across a special token.
        """
        anchor = end or self._anchor
        ids: list[int] = self._tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        return ids[1:] if anchor and (ended or not end) else ids


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _id(calls: Sequence[Call | BadCall], place: int) -> str:
    """Return the id of a call: what the model wrote, if templates take it, nine characters."""
    written = getattr(calls[place], "id", "") if place < len(calls) else ""
    return written if re.fullmatch(r"[A-Za-z0-9]{9}", written) else f"call{place:05d}"


def _spoken(answers: Messages) -> Iterator[dict[str, Any]]:
    """Yield ways to write a turn of the policy with a call for each answer, the likeliest first.

    Some templates want arguments as JSON; some write one call a turn, but take answers behind any.
    """
    for form in (dict, json.dumps) if answers else ():
        calls = [
            {
                "type": "function",
                "id": answer["tool_call_id"],
                "function": {"name": answer.get("name", MARK), "arguments": form({})},
            }
            for answer in answers
        ]
        calls[-1]["function"]["arguments"] = form({"said": SAID})
        yield {"role": "assistant", "content": "", "tool_calls": calls}
    yield {"role": "assistant", "content": SAID}


def _joined(*contents: Any) -> Any:
    """Return contents of messages as one: texts, or lists of parts."""
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    texts = [[{"type": "text", "text": c}] if isinstance(c, str) else list(c) for c in contents]
    return list(chain(*texts))
