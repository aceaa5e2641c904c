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
from trl.config.errors import refuse
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
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        fix = "load one with CausalLMWithValueHead.from_pretrained(...)"
        rule, got = "be a causal language model of transformers", type(model).__name__
        refuse(name, rule, got, fix, error=TypeError)
    for key, weight in model.named_parameters():
        if weight.is_meta:
            got = f"`{key}` on the meta device"
            refuse(name, "hold weights", got, "load the model with from_pretrained(...) first")
        if weight.requires_grad and name == "model" and weight.dtype != torch.float32:
            got = f"`{key}` of {weight.dtype}, where small updates vanish"
            fix = "load it with dtype=torch.float32 and set precision='bf16' to be fast"
            refuse(name, "be trained in float32", got, fix)


def check_models(model: nn.Module, ref_model: Any) -> None:
    """Raise unless the two can be policy and reference.

    Args:
        model: The policy.
        ref_model: A model, or what else a reference may be made of.

    Raises:
        TypeError, ValueError: if one is no language model, or they do not go together.
    """
    check_policy(model, "model")
    if not hasattr(model, "v_head"):
        fix = "wrap it in CausalLMWithValueHead(model), or load it with its from_pretrained(...)"
        got = type(model).__name__
        refuse("model", "have a value head (`v_head`)", got, fix, error=TypeError)
    if isinstance(ref_model, nn.Module):
        check_policy(ref_model, "ref_model")
        check_apart(model, ref_model)
        sizes = [vocabulary_size(each) for each in (model, ref_model)]
        if sizes[0] != sizes[1]:
            got = f"{sizes[0]} and {sizes[1]} tokens"
            refuse("model` and `ref_model", "have the same vocabulary", got)
        check_left_padding(language_model(ref_model))
    check_left_padding(language_model(model))


def check_finite(name: str, logprobs: Tensor) -> None:
    """Raise if a model gives log-probs that are not numbers, before anything is changed by them."""
    if not logprobs.isfinite().all():
        row = int((~logprobs.isfinite()).any(1).nonzero()[0])
        got = f"{logprobs[row].min().item()} in row {row}"
        fix = "its weights hold NaN, or it forbids a token of the response. Nothing was changed"
        refuse(name, "give finite log-probs", got, fix, error=FloatingPointError)


def check_device(model: nn.Module, name: str, device: torch.device) -> None:
    """Raise unless every weight of `model` is on `device`."""
    for key, weight in model.named_parameters():
        # A device without index is the first of its type.
        if (weight.device.type, weight.device.index or 0) != (device.type, device.index or 0):
            rule, got = f"be on {device}, where the trainer runs", f"`{key}` on {weight.device}"
            refuse(name, rule, got, f"call {name}.to('{device}')")


def check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise if what is trained of the policy is a part of the reference too.

    So it is when both are one model, or were made of one, also when PEFT has put an adapter into
    it.
    """
    of_reference = {weight.data_ptr() for weight in ref_model.parameters() if weight.numel()}
    for key, weight in model.named_parameters():
        if weight.requires_grad and weight.data_ptr() in of_reference:
            got = f"`{key}` of `model`, which is trained, so that the KL would always be 0"
            fix = "load the model twice, or leave `ref_model` out"
            refuse("ref_model", "have weights of its own", got, fix)


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
    if gap > allowed:
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
