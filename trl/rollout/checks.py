"""What a policy must be, and what ends of responses it must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from trl.anatomy import language_model, vocabulary_size
from trl.config.errors import refuse


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


def check_end_ids(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Raise unless the model has an embedding for every token that is to end a response."""
    vocabulary = vocabulary_size(model)
    unknown = [token for token in token_ids if token >= vocabulary]
    if unknown:
        fix = "use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        rule = f"hold ids from 0 to {vocabulary - 1}, the tokens of the model"
        refuse("eos_token_id", rule, str(unknown[0]), fix)
