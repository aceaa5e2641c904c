"""What a policy must be, and what queries must be for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.anatomy import is_encoder_decoder, language_model, text_config, vocabulary_size


def uncompiled(model: Any, name: str) -> nn.Module:
    """Return the language model, without what `torch.compile` has put around it.

    Every pass of sampling has another length: each would be compiled anew.

    Args:
        model: A language model of transformers, or a wrapper around one.
        name: What errors call it.

    Raises:
        TypeError: if it is something else.
    """
    model = getattr(model, "_orig_mod", model)
    plain = language_model(model) if isinstance(model, nn.Module) else None
    if not hasattr(plain, "get_input_embeddings") or not hasattr(plain, "config"):
        got = f"one of {type(model).__name__}" if isinstance(model, nn.Module) else repr(model)
        raise TypeError(
            f"`{name}` must be a language model of transformers, or a wrapper with one as its "
            f"`.language_model`, got {got}: AutoModelForCausalLM.from_pretrained(...) loads one."
        )
    return model


def check_queries(model: nn.Module, queries: Tensor) -> None:
    """Raise unless `queries` are [B, Q] token ids that the model knows."""
    if queries.ndim != 2 or queries.shape[0] == 0 or queries.shape[1] == 0:
        raise ValueError(
            f"`queries` must be a tensor [batch, length] with at least one token a row, got shape "
            f"{list(queries.shape)}: encode with return_tensors='pt'."
        )
    if queries.is_floating_point():
        raise TypeError(
            f"`queries` must hold token ids of an integer dtype, got {queries.dtype}: "
            "convert them with .long()."
        )
    check_ids(model, queries.unbind(), "queries")


def check_ids(model: nn.Module, rows: Sequence[Tensor], name: str) -> None:
    """Raise unless the model has an embedding for every token of the rows [Q_i]."""
    vocabulary = vocabulary_size(model)
    tokens = torch.cat([row.cpu() for row in rows])  # one look at all of them
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary:
        return
    for index, row in enumerate(rows):
        if int(row.min()) < 0 or int(row.max()) >= vocabulary:
            raise ValueError(
                f"`{name}` must hold ids from 0 to {vocabulary - 1}, got {int(row.min())} to "
                f"{int(row.max())} in row {index}: the tokenizer does not belong to this model."
            )


def check_end_ids(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Raise unless the model has an embedding for every token that is to end a response."""
    vocabulary = vocabulary_size(model)
    unknown = [token for token in token_ids if token >= vocabulary]
    if unknown:
        raise ValueError(
            f"`eos_token_id` must hold ids from 0 to {vocabulary - 1}, the tokens of the model, "
            f"got {unknown[0]}: the tokenizer does not belong to this model, or the model lacks "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def check_positions(
    model: nn.Module, lengths: list[int], max_new_tokens: int, name: str = "queries"
) -> None:
    """Raise unless the longest query and a response of `max_new_tokens` fit the model."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:
        return
    longest = max(lengths)
    row = lengths.index(longest)
    if is_encoder_decoder(model):  # each side has its own positions
        too_long = max(longest, max_new_tokens) > limit
        rule = f"query and response must each fit the model's {limit} positions"
        got = f"{longest} and {max_new_tokens} tokens"
    else:
        too_long = longest + max_new_tokens > limit
        rule = f"query + response must fit the model's {limit} positions"
        got = f"{longest} + {max_new_tokens} tokens"
    if too_long:
        raise ValueError(
            f"{rule}, got {got} in row {row} of `{name}`: shorten the query or the response."
        )
