"""Queries as a user has them (texts, chats, token tensors) become rows of token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.batch import check_row_mask, check_unicode, token_rows
from trl.config.errors import refuse, shown

Chat = Sequence[Mapping[str, Any]]
"""Messages: {"role": "user", "content": "…"}."""
Queries = (
    Tensor
    | Sequence[Tensor]
    | Sequence[str]
    | Sequence[Chat]
    | Mapping[str, Any]
    | Sequence[Mapping[str, Any]]
)

COLUMNS = ("prompt", "query", "text", "messages")
"""What the column with the prompt may be called, in rows that have several."""


UNFINISHED = "\ufffd"
"""What a tokenizer makes of a part of a character."""


class Encoded(NamedTuple):
    """Queries as rows of token ids, and what they were before."""

    rows: list[Tensor]
    """B rows of token ids [Q_i]."""
    texts: list[str] | None
    """B texts; None for queries that were token ids."""
    messages: list[list[dict[str, Any]]] | None
    """B chats; None for queries that were something else."""
    others: list[dict[str, Any]] | None
    """What else B rows of a data set have, by column; None without such."""


def encode_queries(
    queries: Queries,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    add_bos: bool = False,
    keep_eos: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "queries",
) -> Encoded:
    """Return the token ids of each query [Q_i] and its text.

    The tokenizer adds its own special tokens to a text, but not those that some put at the end
    (EOS, [SEP]): a response would have to follow the end. The text of a chat comes from the chat
    template, up to where the assistant begins to speak, or to where it has come to, if the last
    message is the assistant's; nothing is added to that.

    Args:
        queries: Texts; chats; token ids as a tensor [B, Q] or B tensors of any length; what a
            tokenizer returns (`input_ids` and `attention_mask`); or rows with a column of
            `COLUMNS`, as a data set has them, all with the same columns.
        tokenizer: Needed for texts and chats.
        add_bos: Begin texts with the BOS token where the tokenizer does not do it itself.
        keep_eos: Leave special tokens at the end, as encoders expect them.
        chat_template_kwargs: What the chat template is told besides, as {"enable_thinking": False}.
        name: What errors call the queries.

    Raises:
        TypeError: if the queries are neither texts nor chats nor tensors, or differ in kind.
        ValueError: if there are none, one is empty, or the tokenizer lacks what they need.
    """
    queries, others = prompts_apart(listed(queries, name))
    if isinstance(queries, Tensor) or len(queries) == 0 or isinstance(queries[0], Tensor):
        rows = token_rows(name, queries)
        if tokenizer is not None and len({len(row) for row in rows}) == 1:  # in a list, too
            _check_no_padding(torch.stack(rows), tokenizer, name)
        return Encoded([row.long() for row in rows], None, None, others)
    for index, query in enumerate(queries):
        if type(query) is not type(queries[0]):
            rule = f"be of the same kind as the first query, {type(queries[0]).__name__}"
            refuse(f"{name}[{index}]", rule, type(query).__name__, error=TypeError)
    if tokenizer is None:
        rule, fix = "be tensors of token ids for a sampler without tokenizer", "Sampler(tokenizer)"
        refuse(name, rule, type(queries[0]).__name__, f"make it with {fix}")
    chats = None
    if isinstance(queries[0], str):
        texts = list(queries)
    else:
        chats = [_messages(chat, f"{name}[{index}]") for index, chat in enumerate(queries)]
        texts = _rendered(chats, tokenizer, name, chat_template_kwargs or {})
    check_unicode(texts, name)
    if chats is None:
        rows = _encode_texts(texts, tokenizer, add_bos, keep_eos)
    else:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for index, tokens in enumerate(rows):
        if not tokens:
            fix = "leave it out, or set add_bos=True to let the model begin a text"
            refuse(f"{name}[{index}]", "have at least one token", repr(texts[index]), fix)
    encoded = [torch.tensor(tokens, dtype=torch.long, device="cpu") for tokens in rows]
    return Encoded(encoded, texts, chats, others)


def listed(queries: Any, name: str) -> Tensor | Sequence[Any]:
    """Return queries as a tensor [B, Q] or as a list with an entry for each, rather than one query.

    Rows of a data set stay rows: `prompts_apart` takes the prompts out of them.

    Args:
        queries: See `encode_queries`.
        name: What errors call them.

    Raises:
        TypeError: naming what they are.
        ValueError: for rows without a column of prompts, or with different columns.
    """
    got, one = type(queries).__name__, {"queries": "query", "prompts": "prompt"}.get(name, name)
    if isinstance(queries, Mapping) and "input_ids" in queries:
        return _unpadded(queries, name)
    if isinstance(queries, Tensor):
        return queries
    if hasattr(queries, "iloc"):  # of pandas, whose [0] is a label
        queries = queries.to_dict("records") if queries.ndim == 2 else queries.tolist()
    countable = hasattr(queries, "__getitem__") and hasattr(queries, "__len__")
    if isinstance(queries, str | bytes | Mapping) or not countable:
        rule = "be a list of texts, of chats, or of tensors of token ids"
        of_a_file = " or, for a file, pathlib.Path(...)" if one == "prompt" else ""
        refuse(name, rule, f"one {got}", f"pass [{one}]{of_a_file}", error=TypeError)
    first = queries[0] if len(queries) else None
    if not isinstance(first, Mapping):
        return queries
    if "role" in first:
        got = "the messages of one"
        refuse(name, "be a list of chats", got, "pass [chat]", error=TypeError)
    if "input_ids" in first:
        fix = "pass row['input_ids'][0] of each, a 1-D tensor, or the texts or chats themselves"
        refuse(name, "be token ids as tensors", str(list(first)), fix, error=TypeError)
    if not any(column in first for column in COLUMNS):
        column = next(iter(first), "...")
        fix = f"say which it is: [{{'prompt': row[{column!r}], **row}} for row in {name}]"
        refuse(name, f"be rows with a column of {list(COLUMNS)}", str(list(first)), fix)
    for index, row in enumerate(queries):
        if not isinstance(row, Mapping) or row.keys() != first.keys():
            rule = f"be a row with the columns of the first, {list(first)}"
            got = shown(list(row) if isinstance(row, Mapping) else row)
            refuse(f"{name}[{index}]", rule, got, "give None where there is nothing")
    return queries


def prompts_apart(queries: Any) -> tuple[Any, list[dict[str, Any]] | None]:
    """Return the prompts of rows, and the other columns of each row; queries of another kind as is.

    Args:
        queries: What `listed` returns.
    """
    if isinstance(queries, Tensor) or not len(queries) or not isinstance(queries[0], Mapping):
        return queries, None
    prompt = _prompt_column(queries[0])
    others = [{name: row[name] for name in row if name != prompt} for row in queries]
    return [row[prompt] for row in queries], others if others[0] else None


def _prompt_column(row: Mapping[str, Any]) -> str:
    return next(column for column in COLUMNS if column in row)


def _unpadded(encoding: Mapping[str, Any], name: str) -> list[Tensor]:
    """Return the rows of what a tokenizer has made of texts, without its padding."""
    rows = encoding["input_ids"]
    masks = encoding.get("attention_mask")
    if len(rows) and not hasattr(rows[0], "__len__"):
        rows, masks = [rows], [masks] if masks is not None else None  # of one text
    rows = [row if isinstance(row, Tensor) else torch.as_tensor(row, device="cpu") for row in rows]
    if masks is None:
        return rows
    if len(masks) != len(rows):
        got = f"{len(masks)} for {len(rows)}"
        refuse(name, "have an attention_mask for each row of input_ids", got)
    unpadded = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        counts = torch.as_tensor(mask, device=row.device)
        check_row_mask(f"attention_mask[{index}]` of `{name}", counts, row)
        unpadded.append(row[counts.bool()])
    return unpadded


def _check_no_padding(queries: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise for token ids [B, Q] that a tokenizer has padded: the padding would be read as text.

    A single token at an end may be meant, if padding looks like the BOS or EOS.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    is_pad = queries == pad
    left = is_pad.cumprod(1).sum(1) > int(pad == tokenizer.bos_token_id)
    right = is_pad.flip(1).cumprod(1).sum(1) > int(pad == tokenizer.eos_token_id)
    padded = (left | right).nonzero().flatten().tolist()
    if padded:
        got = f"{tokenizer.pad_token!r} at an end of row {padded[0]}"
        fix = "pass what the tokenizer returns, attention_mask included, or one tensor for each row"
        refuse(name, "be token ids without padding", got, fix)


def _encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, add_bos: bool, keep_eos: bool
) -> list[list[int]]:
    bos = tokenizer.bos_token_id
    if add_bos and bos is None:
        fix = "set tokenizer.bos_token, or leave add_bos out"
        refuse("add_bos", "be False for a tokenizer without a BOS token", fix=fix)
    rows: list[list[int]] = tokenizer(texts)["input_ids"]  # all at once: much faster
    if not any(rows) and (text := next(filter(str.strip, texts), None)):
        fix = "save it beside the model with tokenizer.save_pretrained(...), or pass another one"
        refuse("tokenizer", f"give tokens for {text[:40]!r}", "none", fix)
    end = [] if keep_eos else _added_at_the_end(tokenizer)
    for index, tokens in enumerate(rows):
        if end and tokens[-len(end) :] == end:  # once: one that the user wrote stays
            tokens = tokens[: -len(end)]
        if tokens[:2] == [bos, bos]:  # of the tokenizer, and of a text that a template has made
            tokens = tokens[1:]
        rows[index] = [bos, *tokens] if add_bos and tokens[:1] != [bos] else tokens
    return rows


def _added_at_the_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts behind every text: EOS, [SEP], or none."""
    with_special: list[int] = tokenizer("a")["input_ids"]
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(text), -1, -1):
        if text and with_special[start : start + len(text)] == text:
            return with_special[start + len(text) :]
    return []


def _messages(chat: Any, name: str) -> list[dict[str, Any]]:
    """Return the messages of one chat as plain dicts."""
    messages = list(chat) if isinstance(chat, Sequence) else []
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        messages_are = "a list of messages {'role': ..., 'content': ...}"
        rule = f"be a text, a tensor of token ids or {messages_are}"
        refuse(name, rule, repr(chat), error=TypeError)
    return [dict(message) for message in messages]


def _rendered(
    chats: list[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    told: Mapping[str, Any],
) -> list[str]:
    """Return the text of each chat, up to where the assistant goes on.

    An answer whose beginning is there already is gone on with: it gets no second turn.
    """
    if tokenizer.chat_template is None:
        refuse(name, "be texts for a tokenizer without chat template", "chats", NO_TEMPLATE)
    texts = []
    for index, chat in enumerate(chats):
        begun = chat[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not begun, "continue_final_message": begun}
        try:
            texts.append(str(tokenizer.apply_chat_template(chat, tokenize=False, **how, **told)))
        except Exception as error:  # whatever a template raises
            refuse(f"{name}[{index}]", "be a chat that its template can write", str(error))
    return texts


# -- texts as chats ------------------------------------------------------------------------------

NO_TEMPLATE = (
    "set tokenizer.chat_template, or use the tokenizer of an instruction-tuned model "
    "(model.tokenizer in a recipe)"
)
OURS = ("tokenize", "add_generation_prompt", "continue_final_message")
"""What every query has of its own, and a chat template is not told by a user."""


def check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase | None, told: Any, name: str = "chat_template_kwargs"
) -> None:
    """Raise for what no chat template can be told, or this one does not ask for.

    A template passes over a name that it does not know, without a word.
    """
    if not isinstance(told, Mapping | None):
        refuse(name, "be a dict or None", shown(told), error=TypeError)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for each in told or ():
        if each in OURS or not (template and re.search(rf"\b{re.escape(str(each))}\b", template)):
            rule = "name what the chat template of the tokenizer asks for"
            refuse(name, rule, repr(each), "look into tokenizer.chat_template")


HELLO = [{"role": "user", "content": "Hello"}]
"""A chat that any template can write."""
SENT_AS_CHATS = (
    "texts are sent as the user's messages of chats, since the tokenizer has a chat template "
    "({} sends them as they are)"
)


class ChatForm:
    """How prompts are sent: texts as the user's messages of chats, or as they are.

    Args:
        tokenizer: With the chat template; None: prompts are token ids.
        first: Some of the prompts, or rows of them.
        chat: Whether texts are sent as chats. None: if there is a chat template, and has not
            written the texts already.
        system: The system message of each chat that has none of its own.
        chat_template_kwargs: See `encode_queries`.
        section: What stands before the names of these settings in errors, as "data.".

    Attributes:
        chat: Whether texts are sent as chats.
        decided: Whether nobody but this has said that they are: `SENT_AS_CHATS` tells it.

    Raises:
        ValueError: naming the setting that the chat template cannot do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        first: Sequence[Any],
        *,
        chat: bool | None = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        section: str = "",
    ) -> None:
        self.system, self._section = system, section
        check_template_kwargs(tokenizer, chat_template_kwargs, f"{section}chat_template_kwargs")
        told = dict(chat_template_kwargs or {})
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat and not has_template:
            rule = "be false for a tokenizer without chat template"
            refuse(f"{section}chat", rule, "true", NO_TEMPLATE)
        texts = [text for text in map(_prompt_of, first) if isinstance(text, str)]
        self.chat = has_template if chat is None else chat
        if chat is None and has_template and texts:
            marks = _marks(tokenizer, told)
            self.chat = not any(mark in text for text in texts for mark in marks)
        self.decided = chat is None and self.chat and bool(texts)
        if system is None:
            return
        if not self.chat or tokenizer is None:
            fix = "write it into the prompts" if has_template else NO_TEMPLATE
            refuse(
                f"{section}system", "be None where texts are sent as they are", shown(system), fix
            )
        if problem := self._problem(tokenizer, told):
            rule = f"be None for a chat template that takes no system message ({problem})"
            refuse(f"{section}system", rule, shown(system), "write it into the prompts")

    def __call__(self, prompt: Any) -> Any:
        """Return a prompt, or a row of a data set, as it is sent."""
        if isinstance(prompt, Mapping):
            return {**prompt, _prompt_column(prompt): self(_prompt_of(prompt))}
        if isinstance(prompt, str):
            if not self.chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if self.system is None:
            return prompt
        if isinstance(prompt, Tensor):
            rule = "be None for prompts that are token ids"
            refuse(f"{self._section}system", rule, shown(self.system))
        messages = _messages(prompt, "prompts")
        own = messages[0]["role"] == "system"
        return messages if own else [{"role": "system", "content": self.system}, *messages]

    def _problem(self, tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any]) -> str:
        """Return why the template takes no system message; empty: it does."""
        _rendered([HELLO], tokenizer, "prompts", told)  # else it is not about that
        try:
            (text,) = _rendered([self(HELLO)], tokenizer, "prompts", told)
        except ValueError as error:
            return str(error.__context__)
        return "" if str(self.system).strip() in text else "it leaves the message out"


def _prompt_of(row: Any) -> Any:
    return row[_prompt_column(row)] if isinstance(row, Mapping) else row


def _marks(tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any]) -> list[str]:
    """Return the special tokens that the chat template writes: a text with one is its work."""
    (text,) = _rendered([HELLO], tokenizer, "prompts", told)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [str(token) for token in added if token.special and str(token) in text]


def decode_pair(
    query: list[int],
    response: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    apart: bool = False,
    keep_special_tokens: bool = False,
    end_ids: Sequence[int] = (),
) -> tuple[str, str]:
    """Return the texts of a query and of what the response adds to it.

    They are decoded together: many tokenizers drop the space before the first word of a text, so
    a response that is decoded alone would run into the last word of its query; and a character may
    begin in the last token of the query and end in the first of the response, which then has it.

    Args:
        query: Token ids.
        response: Token ids.
        tokenizer: Of both.
        apart: Decode each alone, as an encoder-decoder has them.
        keep_special_tokens: Leave special tokens in, but for one that ends the response.
        end_ids: The tokens that end a response.
    """

    def text_of(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=not keep_special_tokens)

    if keep_special_tokens and response and response[-1] in end_ids:
        response = response[:-1]
    before = text_of(query)
    if not apart:
        both = text_of(query + response)
        whole = before if both.startswith(before) else before.rstrip(UNFINISHED)
        if both.startswith(whole):
            return whole, both[len(whole) :]
    return before, text_of(response)
