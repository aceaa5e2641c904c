"""Sampling responses with a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from trl.batch import Rollout, check_left_padded, check_token_mask
from trl.core import mask_after, position_ids_from_mask


@torch.no_grad()
def sample(
    model: nn.Module,
    queries: Tensor,
    query_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample a response to each query from a causal language model.

    With `top_k` 0 and `top_p` 1 the tokens come from the model's own distribution, the one that
    training scores. Other settings sample from a cut distribution: the KL that training then
    measures is not that of what was sampled.

    Args:
        model: A causal language model of transformers. Runs without dropout.
        queries: [B, Q] token ids, left-padded if their lengths differ.
        query_mask: [B, Q], True or 1 on real tokens; None: all are real.
        max_new_tokens: R, the most tokens of a response.
        temperature: Divides the logits. Give the same number to `PPOConfig`.
        top_k: Sample among the k likeliest tokens; 0: all.
        top_p: Sample among the likeliest tokens that together have this probability; 1: all.
        eos_token_id: A response ends with the first of these; None: it never ends early.
        generator: Source of randomness; None: torch's global one.

    Returns:
        A rollout whose responses are [B, R' <= R]; columns after every row's end are left off.

    Raises:
        ValueError: if a setting is out of range, or the model has too few positions.
        FloatingPointError: if the model gives NaN.
    """
    _check(model, queries, max_new_tokens, temperature, top_k, top_p)
    if query_mask is None:
        query_mask = torch.ones_like(queries, dtype=torch.bool)
    query_mask = query_mask.bool()
    check_token_mask("query_mask", query_mask, queries)
    check_left_padded("query_mask", query_mask)
    warpers = ([TopKLogitsWarper(top_k)] if top_k > 0 else []) + (
        [TopPLogitsWarper(top_p)] if top_p < 1 else []
    )

    # Room for the longest sequence, so that the mask grows without a copy for each token.
    attention_mask = torch.ones(
        len(queries),
        queries.shape[1] + max_new_tokens,
        dtype=torch.bool,
        device=queries.device,
    )
    attention_mask[:, : queries.shape[1]] = query_mask
    positions = position_ids_from_mask(attention_mask)
    ended = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    inputs, cache = queries.masked_fill(~query_mask, 0), None
    finite = torch.ones((), dtype=torch.bool, device=queries.device)
    tokens: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for length in range(queries.shape[1], queries.shape[1] + max_new_tokens):
            output = model(
                input_ids=inputs,
                attention_mask=attention_mask[:, :length],
                position_ids=positions[:, length - inputs.shape[1] : length],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float() / temperature  # [B, V]
            finite &= ~logits.isnan().any()
            for warper in warpers:
                logits = warper(inputs, logits)
            token = draw(logits.softmax(-1), generator)  # [B, 1]
            tokens.append(token)
            inputs = token
            if eos_token_id is not None:
                ended |= token[:, 0] == eos_token_id
                if ended.all():
                    break
    finally:
        model.train(was_training)

    if not finite:
        raise FloatingPointError(
            "`model` must give finite logits, got NaN: its weights hold NaN or infinity. Go back "
            "to the last good checkpoint."
        )
    responses = torch.cat(tokens, dim=1)
    response_mask = torch.ones_like(responses, dtype=torch.bool)
    if eos_token_id is not None:
        response_mask = mask_after(responses, eos_token_id)
        responses = responses.masked_fill(~response_mask, 0)
    return Rollout(queries.masked_fill(~query_mask, 0), query_mask, responses, response_mask)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each row by inverting the cumulative distribution.

    The token is the first whose cumulative probability exceeds u, uniform on [0, 1): one random
    number for each row, where `torch.multinomial` takes one for each token of the vocabulary.

    Args:
        probabilities: [B, V]; the rows need not sum to exactly 1.
        generator: Source of randomness; None: torch's global one.

    Returns:
        [B, 1] token ids, never one of probability 0.
    """
    device = probabilities.device
    # float32 sums over a large vocabulary would lose tokens of small probability.
    precision = torch.float32 if device.type == "mps" else torch.float64
    cumulative = probabilities.cumsum(-1, dtype=precision)
    uniform = torch.rand(len(probabilities), 1, dtype=precision, device=device, generator=generator)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding may carry u up to the sum itself: then the last token with any probability.
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(token, last)


def _check(
    model: nn.Module,
    queries: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
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
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(queries.min()) < 0 or int(queries.max()) >= vocabulary:
        raise ValueError(
            f"`queries` must hold ids from 0 to {vocabulary - 1}, got {int(queries.min())} to "
            f"{int(queries.max())}: the tokenizer does not belong to this model."
        )
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be > 0, got {max_new_tokens}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}.")
    if top_k < 0:
        raise ValueError(f"`top_k` must be >= 0 (0: all tokens), got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and queries.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"query + response must fit the model's {limit} positions, got {queries.shape[1]} + "
            f"{max_new_tokens} tokens: shorten the queries or the response."
        )
