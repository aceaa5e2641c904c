"""Queries as a user has them (texts, chats, token tensors) become rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.batch import token_rows
from trl.config.errors import refuse

Chat = Sequence[Mapping[str, Any]]
"""Messages: {"role": "user", "content": "…"}."""
Queries = Tensor | Sequence[Tensor] | Sequence[str] | Sequence[Chat]


class Encoded(NamedTuple):
    """Queries as rows of token ids, and what they were before."""

    rows: list[Tensor]
    """B rows of token ids [Q_i]."""
    texts: list[str] | None
    """B texts; None for queries that were token ids."""
    messages: list[list[dict[str, Any]]] | None
    """B chats; None for queries that were something else."""


def encode_queries(
    queries: Queries,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    add_bos: bool = False,
    keep_eos: bool = False,
    name: str = "queries",
) -> Encoded:
    """Return the token ids of each query [Q_i] and its text.

    The tokenizer adds its own special tokens to a text, but not the EOS that some put at the end:
    a response would have to follow the end. The text of a chat comes from the chat template, up
    to where the assistant begins to speak; nothing is added to that.

    Args:
        queries: Texts, chats, or token ids as a tensor [B, Q] or B tensors of any length.
        tokenizer: Needed for texts and chats.
        add_bos: Begin texts with the BOS token where the tokenizer does not do it itself.
        keep_eos: Leave an EOS at the end, as encoders expect it.
        name: What errors call the queries.

    Raises:
        TypeError: if the queries are neither texts nor chats nor tensors, or differ in kind.
        ValueError: if there are none, one is empty, or the tokenizer lacks what they need.
    """
    check_list(queries, name)
    if isinstance(queries, Tensor) or len(queries) == 0 or isinstance(queries[0], Tensor):
        return Encoded([row.long() for row in token_rows(name, queries)], None, None)
    _check_kinds(queries, name)
    if tokenizer is None:
        rule, fix = "be tensors of token ids for a sampler without tokenizer", "Sampler(tokenizer)"
        refuse(name, rule, type(queries[0]).__name__, f"make it with {fix}")
    messages = None
    if isinstance(queries[0], str):
        texts = list(queries)
        rows = _encode_texts(texts, tokenizer, add_bos, keep_eos)
    else:
        messages = [_messages(chat, f"{name}[{index}]") for index, chat in enumerate(queries)]
        texts = _rendered(messages, tokenizer, name)
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for index, tokens in enumerate(rows):
        if not tokens:
            fix = "leave it out, or set add_bos=True to let the model begin a text"
            refuse(f"{name}[{index}]", "have at least one token", repr(texts[index]), fix)
    return Encoded([torch.tensor(tokens, dtype=torch.long) for tokens in rows], texts, messages)


def check_list(queries: Any, name: str) -> None:
    """Raise unless `queries` are a tensor or can be a list of queries, rather than one query.

    Raises:
        TypeError: naming what they are.
    """
    got, one = type(queries).__name__, {"queries": "query", "prompts": "prompt"}.get(name, name)
    if isinstance(queries, str | bytes | Mapping):
        refuse(name, "be a list", f"one {got}", f"pass [{one}]", error=TypeError)
    if isinstance(queries, Tensor):
        return
    if not isinstance(queries, Sequence) and not hasattr(queries, "__getitem__"):
        rule = "be a list of texts, of chats, or of tensors of token ids"
        refuse(name, rule, got, f"pass [{one}]", error=TypeError)
    if len(queries) > 0 and isinstance(queries[0], Mapping):
        got = "the messages of one"
        refuse(name, "be a list of chats", got, "pass [chat]", error=TypeError)


def _check_kinds(queries: Sequence[Any], name: str) -> None:
    """Raise unless all queries are of one kind."""
    for index, query in enumerate(queries):
        if type(query) is not type(queries[0]):
            rule = f"be of the same kind as the first query, {type(queries[0]).__name__}"
            refuse(f"{name}[{index}]", rule, type(query).__name__, error=TypeError)


def _encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, add_bos: bool, keep_eos: bool
) -> list[list[int]]:
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if add_bos and bos is None:
        fix = "set tokenizer.bos_token, or leave add_bos out"
        refuse("add_bos", "be False for a tokenizer without a BOS token", fix=fix)
    rows: list[list[int]] = tokenizer(texts)["input_ids"]  # all at once: much faster
    if not any(rows) and (text := next(filter(str.strip, texts), None)):
        raise ValueError(
            f"`tokenizer` gives no tokens for {text[:40]!r}: the folder it came from has none of "
            "its own; save it beside the model with tokenizer.save_pretrained(...), or pass "
            "tokenizer=."
        )
    for index, (text, tokens) in enumerate(zip(texts, rows, strict=True)):
        # An EOS that the user wrote stays.
        if not keep_eos and tokens and tokens[-1] == eos and not text.endswith(tokenizer.eos_token):
            tokens = tokens[:-1]
        rows[index] = [bos, *tokens] if add_bos and tokens[:1] != [bos] else tokens
    return rows


def _messages(chat: Any, name: str) -> list[dict[str, Any]]:
    """Return the messages of one chat as plain dicts."""
    messages = list(chat) if isinstance(chat, Sequence) else []
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        messages_are = "a list of messages {'role': ..., 'content': ...}"
        rule = f"be a text, a tensor of token ids or {messages_are}"
        refuse(name, rule, repr(chat), error=TypeError)
    return [dict(message) for message in messages]


def _rendered(
    chats: list[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, name: str
) -> list[str]:
    """Return the text of each chat, up to where the assistant begins to speak."""
    if tokenizer.chat_template is None:
        fix = "set tokenizer.chat_template, or use the tokenizer of an instruction-tuned model"
        refuse(name, "be texts for a tokenizer without chat template", "chats", fix)
    return [
        str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        for chat in chats
    ]


def decode_response(
    query: list[int], response: list[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the text that the response adds to its query.

    Many tokenizers drop the space before the first word of a text, so a response that is decoded
    alone would run into the last word of its query.
    """
    before = tokenizer.decode(query, skip_special_tokens=True)
    both = tokenizer.decode(query + response, skip_special_tokens=True)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(response, skip_special_tokens=True)
