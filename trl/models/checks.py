"""Checks of models against what they are asked to do; every message names the fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from trl.anatomy import (
    accepts,
    language_model,
    low_precision_of,
    seen_while,
    vocabulary_size,
    without_dropout,
)
from trl.batch import Rollout
from trl.config.errors import refuse
from trl.fit import check_ids, check_positions
from trl.kernels.sharded import agreed, device_of, is_sharded, own_part
from trl.kernels.stored import held_of
from trl.models.critic import critic_of
from trl.models.response import ResponseModel

# How far the hidden states of a token may be, in relation to their size, from those of the same
# token beside padding, or read by itself: rounding is far below, attending to padding or counting
# it far above.
_TOLERANCE, _TOLERANCE_LOW = 5e-3, 0.1

_FAILURES = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Of a family whose code wants something else."""

_WRONG = "its log-probs would be wrong, use a model of another family"


def check_policy(model: nn.Module, name: str) -> None:
    """Raise unless `model` is a causal language model with loaded weights.

    Raises:
        TypeError: if it is not a model of transformers with a language head.
        ValueError: if its weights are not loaded, or sharded, or to be trained in low precision.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        fix = "load one with CausalLMWithValueHead.from_pretrained(...)"
        rule, got = "be a causal language model of transformers", type(model).__name__
        refuse(name, rule, got, fix, error=TypeError)
    for key, weight in model.named_parameters():
        if weight.is_meta:
            got = f"`{key}` on the meta device"
            refuse(name, "hold weights", got, "load the model with from_pretrained(...) first")
        if is_sharded(weight):
            got = f"`{key}`, of which each process has a part"
            fix = "load it anew, without a tp_plan, and let PPOTrainer(..., shard=True) shard it"
            refuse(name, "hold whole weights", got, fix)
        if name != "model" or not weight.requires_grad:
            continue
        if weight.dtype != torch.float32:
            got = f"`{key}` of {weight.dtype}, where small updates vanish"
            fix = "load it with dtype=torch.float32 and set precision='bf16' to be fast"
            refuse(name, "be trained in float32", got, fix)
    if name == "model":
        _check_quantized(model)


def _check_quantized(model: nn.Module) -> None:
    """Raise if a model's matrices are quantised and something of it is to be trained all the same.

    It would be embeddings, norms and head, unless the quantisation is made for training.
    """
    plain = language_model(model)
    adapter = hasattr(getattr(model, "pretrained_model", None), "get_base_model")
    quantizer = getattr(plain, "hf_quantizer", None)
    made_for_it = getattr(quantizer, "is_trainable" if adapter else "is_qat_trainable", False)
    trained = any(weight.requires_grad for weight in plain.parameters())
    if getattr(plain, "is_quantized", False) and trained and not made_for_it:
        method = getattr(plain, "quantization_method", None)
        got = f"{getattr(method, 'value', method)}, which trains no matrix"
        fix = "load it with peft_config=LoraConfig(...), or without quantization_config"
        if adapter:
            got, fix = f"{got}, nor an adapter on it", "quantise with bitsandbytes, say"
        refuse("model", "not be quantised where it is trained", got, fix)


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
    for each in (model, critic_of(model), ref_model):
        if isinstance(each, nn.Module):
            check_one_pass(language_model(each))
            check_left_padding(language_model(each))


def check_finite(name: str, logprobs: Tensor) -> None:
    """Raise if a model gives log-probs that are not numbers, before anything is changed by them."""
    if not logprobs.isfinite().all():
        row = int((~logprobs.isfinite()).any(1).nonzero()[0])
        got = f"{logprobs[row].min().item()} in row {row}"
        fix = "its weights hold NaN, or it forbids a token of the response. Nothing was changed"
        refuse(name, "give finite log-probs", got, fix, error=FloatingPointError)


def are_finite(weights: Sequence[Tensor]) -> bool:
    """Return whether all weights are numbers, on every process; no copy of them is made."""
    parts = [own_part(weight.detach()) for weight in weights]
    ends = [torch.stack(torch.aminmax(part)).isfinite().all() for part in parts if part.numel()]
    sound = not ends or bool(torch.stack([end.to(ends[0].device) for end in ends]).all())
    return agreed(sound, weights)


def check_device(model: nn.Module, name: str, device: torch.device) -> None:
    """Raise unless every weight of `model` is on `device`."""
    for key, weight in model.named_parameters():
        its = device_of(weight)
        # A device without index is the first of its type.
        if (its.type, its.index or 0) != (device.type, device.index or 0):
            rule, got = f"be on {device}, where the trainer runs", f"`{key}` on {its}"
            refuse(name, rule, got, f"call {name}.to('{device}')")


def check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise if what is trained of the policy is a part of the reference too.

    So it is when both are one model, or were made of one, also when PEFT has put an adapter into
    it.
    """
    of_reference = {held_of(each).data_ptr() for each in ref_model.parameters() if each.numel()}
    for key, weight in model.named_parameters():
        if weight.requires_grad and held_of(weight).data_ptr() in of_reference:
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
    tokens = (torch.arange(15, device="cpu") * 7 + 3) % vocabulary_size(plain)
    short, long = tokens[:6], tokens[6:]
    rollout = Rollout.from_lists([short[:-1], long[:-1]], [short[-1:], long[-1:]])

    def alone() -> Tensor:
        states, _ = seen_while(
            plain, plain, input_ids=short[None].to(plain.device), use_cache=False
        )
        return states[0, :-1].float()  # the last predicts nothing

    expected = alone()
    rule = (
        "take rows that are padded on the left, with an attention mask and positions counted from "
        "the first real token"
    )
    try:
        padded, _ = seen_while(plain, ResponseModel(plain), rollout.to(plain.device))
    except _FAILURES as error:
        refuse(type(plain).__name__, rule, f"{type(error).__name__}: {error}", _WRONG)
    if gap := _gap(plain, padded[0, 1 - len(short) :].float(), expected, alone):
        got = f"hidden states that change by {gap:.1%}"
        refuse(type(plain).__name__, rule, got, _WRONG)


def check_one_pass(plain: PreTrainedModel) -> None:
    """Raise unless a pass over a text gives what reading it token by token gives.

    A response is written token by token, with a cache, and scored by a single pass. Some families
    look at what follows a token, and the caches of some are wrong; a few tokens show it.

    Args:
        plain: A language model of transformers, see `language_model`.

    Raises:
        ValueError: if hidden states or logits differ by more than rounding.
    """
    tokens = ((torch.arange(6, device=plain.device) * 7 + 3) % vocabulary_size(plain))[None]
    columns, given = {"input_ids": tokens}, {}
    if plain.config.is_encoder_decoder:
        with torch.no_grad(), without_dropout(plain), low_precision_of(plain):
            given["encoder_outputs"] = plain.get_encoder()(input_ids=tokens)
        columns = {"decoder_input_ids": tokens}
    elif accepts(plain, "position_ids"):
        columns["position_ids"] = torch.arange(6, device=plain.device)[None]

    def predicted(hidden: Tensor, output: Any) -> Tensor:
        # ProphetNet's hidden states are those of a text that is read at once, but not its logits.
        return torch.cat([normalize(x[0].float(), dim=-1) for x in (hidden, output.logits)], dim=-1)

    def at_once() -> Tensor:
        return predicted(*seen_while(plain, plain, **given, **columns, use_cache=False))

    whole, caches = at_once(), {}
    rule = "predict the same whether a text is read at once or token by token"
    for what, seen in ("what follows", slice(0, 4)), ("its cache", slice(4, 5)):
        part = {name: column[:, seen] for name, column in columns.items()}
        try:
            found = seen_while(plain, plain, **given, **caches, **part, use_cache=True)
        except _FAILURES:
            return  # it takes no cache, or more than that: who samples with it says so
        if gap := _gap(plain, predicted(*found), whole[seen], lambda seen=seen: at_once()[seen]):
            refuse(type(plain).__name__, rule, f"{gap:.1%} of change by {what}", _WRONG)
        kinds = ("past_key_values", "cache_params")
        caches = {kind: found[1][kind] for kind in kinds if found[1].get(kind) is not None}
        if not caches:
            return


def _gap(
    plain: PreTrainedModel, found: Tensor, expected: Tensor, again: Callable[[], Tensor]
) -> float:
    """Return how far the states [T, d] are from the expected ones, in relation to their size.

    Args:
        plain: Whose they are.
        found: Those to look at.
        expected: What they should be.
        again: Computes these once more: noise hides what else makes a difference.

    Returns:
        0 if it is not more than rounding or noise.
    """
    exact = all(weight.dtype == torch.float32 for weight in plain.parameters())

    def relative(states: Tensor) -> float:
        gap = (states - expected).norm(dim=-1) / expected.norm(dim=-1)
        # At low precision a token may go to another expert than when alone: the others still tell.
        return float(gap.max() if exact else gap.median())

    allowed = _TOLERANCE if exact else _TOLERANCE_LOW
    gap = relative(found)
    return gap if gap > allowed and relative(again()) <= allowed else 0.0


def check_fits(model: nn.Module, rollout: Rollout) -> None:
    """Raise if the model does not know a token of the rollout, or has too few positions for it."""
    check_ids(model, rollout.queries, "query")
    check_ids(model, rollout.responses, "response")
    queries = rollout.query_mask.sum(1)
    check_positions(model, queries, rollout.lengths - queries, "query")
