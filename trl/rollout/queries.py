"""Queries as a user has them (texts, chats, token tensors) become rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.batch import token_rows

Chat = Sequence[Mapping[str, Any]]
"""Messages: {"role": "user", "content": "…"}."""
Queries = Tensor | Sequence[Tensor] | Sequence[str] | Sequence[Chat]


def encode_queries(
    queries: Queries,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    add_bos: bool = False,
    keep_eos: bool = False,
) -> tuple[list[Tensor], list[str] | None]:
    """Return the token ids of each query [Q_i] and its text.

    The tokenizer adds its own special tokens to a text, but not the EOS that some put at the end:
    a response would have to follow the end. The text of a chat comes from the chat template, up
    to where the assistant begins to speak; nothing is added to that.

    Args:
        queries: Texts, chats, or token ids as a tensor [B, Q] or B tensors of any length.
        tokenizer: Needed for texts and chats; without one, token ids get no text.
        add_bos: Begin texts with the BOS token where the tokenizer does not do it itself.
        keep_eos: Leave an EOS at the end, as encoders expect it.

    Raises:
        TypeError: if the queries are neither texts nor chats nor tensors, or differ in kind.
        ValueError: if there are none, one is empty, or the tokenizer lacks what they need.
    """
    if isinstance(queries, str | Mapping):
        raise TypeError(
            f"`queries` must be a list, got one {type(queries).__name__}: pass [query]."
        )
    if not isinstance(queries, Tensor) and len(queries) > 0 and isinstance(queries[0], Mapping):
        raise TypeError("`queries` must be a list of chats, got the messages of one: pass [chat].")
    if isinstance(queries, Tensor) or len(queries) == 0 or isinstance(queries[0], Tensor):
        rows = [row.long() for row in token_rows("queries", queries)]
        if tokenizer is None:
            return rows, None
        return rows, [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    if tokenizer is None:
        raise ValueError(
            "`queries` must be tensors of token ids for a sampler without tokenizer, got "
            f"{type(queries[0]).__name__}: make it with Sampler(tokenizer)."
        )
    rows, texts = [], []
    for index, query in enumerate(queries):
        if type(query) is not type(queries[0]):
            raise TypeError(
                f"`queries[{index}]` must be of the same kind as the first query, "
                f"{type(queries[0]).__name__}, got {type(query).__name__}."
            )
        if isinstance(query, str):
            text, tokens = query, _encode_text(query, tokenizer, add_bos, keep_eos)
        else:
            text = _render_chat(index, query, tokenizer)
            tokens = tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise ValueError(
                f"`queries[{index}]` must have at least one token, got {text!r}: leave it out, or "
                "set add_bos=True to let the model begin a text."
            )
        rows.append(torch.tensor(tokens, dtype=torch.long))
        texts.append(text)
    return rows, texts


def _encode_text(
    text: str, tokenizer: PreTrainedTokenizerBase, add_bos: bool, keep_eos: bool
) -> list[int]:
    tokens: list[int] = tokenizer.encode(text)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # An EOS that the user wrote stays.
    if not keep_eos and tokens and tokens[-1] == eos and not text.endswith(tokenizer.eos_token):
        tokens = tokens[:-1]
    if add_bos:
        if bos is None:
            raise ValueError(
                "`add_bos` must be False for a tokenizer without a BOS token: set "
                "tokenizer.bos_token, or leave add_bos out."
            )
        if tokens[:1] != [bos]:
            tokens = [bos, *tokens]
    return tokens


def _render_chat(index: int, chat: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = list(chat) if isinstance(chat, Sequence) else []
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise TypeError(
            f"`queries[{index}]` must be a text, a tensor of token ids or a list of messages "
            f"{{'role': ..., 'content': ...}}, got {chat!r}."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            "`queries` must be texts for a tokenizer without chat template, got chats: set "
            "tokenizer.chat_template, or use the tokenizer of an instruction-tuned model."
        )
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


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
