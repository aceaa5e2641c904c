"""Checks of models against what they are asked to do; every message names the fix."""

from __future__ import annotations

import torch
from torch import nn

from trl.batch import Rollout


def check_policy(model: nn.Module, name: str) -> None:
    """Raise unless `model` is a causal language model with loaded weights.

    Raises:
        TypeError: if it is not a model of transformers with a language head.
        ValueError: if its weights are not loaded, or are to be trained in low precision.
    """
    if not isinstance(model, nn.Module) or not callable(
        getattr(model, "get_output_embeddings", None)
    ):
        raise TypeError(
            f"`{name}` must be a causal language model of transformers, got "
            f"{type(model).__name__}: load one with CausalLMWithValueHead.from_pretrained(...)."
        )
    for key, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"`{name}` must hold weights, but `{key}` is on the meta device: load the model "
                "with from_pretrained(...) before making the trainer."
            )
        if weight.requires_grad and name == "model" and weight.dtype != torch.float32:
            raise ValueError(
                f"`{name}` must be trained in float32, but `{key}` is {weight.dtype}: small "
                "updates vanish at lower precision. Load it with dtype=torch.float32 and set "
                "precision='bf16' for fast matrix products."
            )


def check_device(model: nn.Module, name: str, device: torch.device) -> None:
    """Raise unless every weight of `model` is on `device`."""
    for key, weight in model.named_parameters():
        # A device without index is the first of its type.
        if (weight.device.type, weight.device.index or 0) != (device.type, device.index or 0):
            raise ValueError(
                f"`{name}` must be on {device}, where the trainer runs, but `{key}` is on "
                f"{weight.device}: call {name}.to('{device}')."
            )


def check_fits(model: nn.Module, rollout: Rollout) -> None:
    """Raise if the model does not know a token of the rollout, or has too few positions for it."""
    vocabulary = model.get_input_embeddings().num_embeddings
    for name, tokens in (("query", rollout.queries), ("response", rollout.responses)):
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            row = int(((tokens < 0) | (tokens >= vocabulary)).any(1).nonzero()[0])
            raise ValueError(
                f"`{name}[{row}]` must hold token ids from 0 to {vocabulary - 1}, got "
                f"{int(tokens[row].min())} to {int(tokens[row].max())}: encode with the model's "
                "own tokenizer."
            )
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = rollout.lengths
    if getattr(model.config, "is_encoder_decoder", False):  # each has positions of its own
        queries = rollout.query_mask.sum(1)
        lengths = torch.maximum(queries, lengths - queries)
    longest = int(lengths.max())
    if limit is not None and longest > limit:
        row = int(lengths.argmax())
        raise ValueError(
            f"query + response must fit the model's {limit} positions, got {longest} tokens in "
            f"row {row}: shorten the query or the response."
        )
