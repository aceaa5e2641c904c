"""What a policy must be, and what queries must be for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trl.anatomy import language_model, vocabulary_size
from trl.config.errors import refuse
from trl.fit import check_ids


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
        rule = "be a language model of transformers, or have one as its `.language_model`"
        fix = "AutoModelForCausalLM.from_pretrained(...) loads one"
        refuse(name, rule, got, fix, error=TypeError)
    return model


def check_queries(model: nn.Module, queries: Tensor) -> None:
    """Raise unless `queries` are [B, Q] token ids that the model knows."""
    if queries.ndim != 2 or queries.shape[0] == 0 or queries.shape[1] == 0:
        rule = "be a tensor [batch, length] with at least one token a row"
        got = f"shape {list(queries.shape)}"
        refuse("queries", rule, got, "encode with return_tensors='pt'")
    if queries.is_floating_point():
        rule, fix = "hold token ids of an integer dtype", "convert them with .long()"
        refuse("queries", rule, str(queries.dtype), fix, error=TypeError)
    check_ids(model, queries, "queries")


def check_end_ids(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Raise unless the model has an embedding for every token that is to end a response."""
    vocabulary = vocabulary_size(model)
    unknown = [token for token in token_ids if token >= vocabulary]
    if unknown:
        fix = (
            "the tokenizer does not belong to this model, or the model lacks "
            "model.resize_token_embeddings(len(tokenizer))"
        )
        rule = f"hold ids from 0 to {vocabulary - 1}, the tokens of the model"
        refuse("eos_token_id", rule, str(unknown[0]), fix)
