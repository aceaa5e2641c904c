"""Checks of models against what they are asked to do; every message names the fix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.anatomy import (
    keep_hidden_states,
    language_model,
    low_precision_of,
    vocabulary_size,
    without_dropout,
)
from trl.batch import Rollout
from trl.fit import check_ids, check_positions
from trl.models.response import ResponseModel

# How far the hidden states of a token may be, in relation to their size, from those of the same
# token beside padding: rounding is far below, attending to padding or counting it far above.
_PADDING_TOLERANCE, _PADDING_TOLERANCE_LOW = 5e-3, 0.1


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


def check_models(model: nn.Module, ref_model: Any) -> None:
    """Raise unless the two can be policy and reference.

    Args:
        model: The policy.
        ref_model: A model, or what else a reference may be made of.

    Raises:
        TypeError, ValueError: if one is no language model, or they do not go together.
    """
    check_policy(model, "model")
    both = [model]
    if isinstance(ref_model, nn.Module):
        check_policy(ref_model, "ref_model")
        both.append(ref_model)
    if not hasattr(model, "v_head"):
        raise TypeError(
            f"`model` must have a value head (`v_head`), got {type(model).__name__}: wrap it in "
            "CausalLMWithValueHead(model), or load it with "
            "CausalLMWithValueHead.from_pretrained(...)."
        )
    if model is ref_model:
        raise ValueError(
            "`ref_model` must be another object than `model`, else both are trained and the KL "
            "is always 0: load the model twice, or leave `ref_model` out for a frozen copy."
        )
    if isinstance(ref_model, nn.Module):
        check_apart(model, ref_model)
    sizes = [vocabulary_size(each) for each in both]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"`model` and `ref_model` must have the same vocabulary, got {sizes[0]} and "
            f"{sizes[1]} tokens."
        )
    for each in both:
        check_left_padding(language_model(each))


def check_finite(name: str, logprobs: Tensor) -> None:
    """Raise if a model gives log-probs that are not numbers, before anything is changed by them."""
    if not logprobs.isfinite().all():
        row = int((~logprobs.isfinite()).any(1).nonzero()[0])
        raise FloatingPointError(
            f"`{name}` must give finite log-probs, got {logprobs[row].min().item()} in row {row}: "
            "its weights hold NaN, or it forbids a token of the response. Nothing was changed."
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


def check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise if what is trained of the policy is a part of the reference too.

    So it is when both were made of one loaded model, also when PEFT has put an adapter into it.
    """
    own = {weight.data_ptr() for weight in ref_model.parameters() if weight.numel()}
    for key, weight in model.named_parameters():
        if weight.requires_grad and weight.data_ptr() in own:
            raise ValueError(
                f"`ref_model` must have weights of its own, but `{key}` of `model` is trained and "
                "belongs to both, so the KL would always be 0: load the model twice, or leave "
                "`ref_model` out for the reference that suits the policy."
            )


def check_left_padding(plain: PreTrainedModel) -> None:
    """Raise unless the model gives a row the same hidden states beside padding as alone.

    Rows of several lengths are padded on the left, with a mask and, where the model takes them,
    positions counted from the first real token. Not every family can do with that; a few tokens
    show whether this one does. (An encoder-decoder gets no padding on the left.)

    Args:
        plain: A language model of transformers, see `language_model`.

    Raises:
        ValueError: if the hidden states differ by more than rounding.
    """
    if plain.config.is_encoder_decoder:
        return
    tokens = (torch.arange(15) * 7 + 3) % vocabulary_size(plain)
    short, long = tokens[:6], tokens[6:]
    responder = ResponseModel(plain)
    rollout = Rollout.from_lists([short[:-1], long[:-1]], [short[-1:], long[-1:]])
    alone = {"input_ids": short[None].to(plain.device), "use_cache": False}
    expected = _hidden_states(plain, plain, **alone)[0, :-1]  # the last predicts nothing
    try:
        padded = _hidden_states(plain, responder, rollout.to(plain.device))[0, 1 - len(short) :]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _no_left_padding(plain, f"it fails: {error}") from error
    exact = all(weight.dtype == torch.float32 for weight in plain.parameters())
    allowed = _PADDING_TOLERANCE if exact else _PADDING_TOLERANCE_LOW
    gap = _relative_gap(padded, expected, exact)
    if gap <= allowed:
        return
    again = _hidden_states(plain, plain, **alone)[0, :-1]
    if _relative_gap(again, expected, exact) <= allowed:  # else noise hides what padding does
        raise _no_left_padding(plain, f"its hidden states change by {gap:.1%}")


@torch.no_grad()
def _hidden_states(plain: PreTrainedModel, run: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Return the last hidden states [B, T, d] while `run`, the model or a wrapper, computes."""
    with without_dropout(plain), keep_hidden_states(plain) as kept, low_precision_of(plain):
        run(*args, **kwargs)
    return kept.hidden.float()


def _relative_gap(states: Tensor, expected: Tensor, exact: bool) -> float:
    """Return how far the states [T, d] are from the expected ones, in relation to their size."""
    gap = (states - expected).norm(dim=-1) / expected.norm(dim=-1)
    # At low precision a token may go to another expert than when alone: the others still tell.
    return float(gap.max() if exact else gap.median())


def _no_left_padding(plain: PreTrainedModel, symptom: str) -> ValueError:
    return ValueError(
        f"`{type(plain).__name__}` must take rows that are padded on the left, with an attention "
        f"mask and positions counted from the first real token, but {symptom}: its log-probs "
        "would be wrong. Use a model of another family."
    )


def check_fits(model: nn.Module, rollout: Rollout) -> None:
    """Raise if the model does not know a token of the rollout, or has too few positions for it."""
    check_ids(model, rollout.queries, "query")
    check_ids(model, rollout.responses, "response")
    queries = rollout.query_mask.sum(1)
    check_positions(model, queries, rollout.lengths - queries, "query")
