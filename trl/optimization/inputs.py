"""What `step` is given: a rollout and its scores, checked against settings and algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl.batch import ResponseOutput, Rollout, TokenLists, token_rows
from trl.config import PPOConfig
from trl.config.errors import refuse
from trl.optimization.advantages import numbered
from trl.optimization.algorithms import Algorithm
from trl.scored import Scored

Pretraining = Callable[[int], Sequence[Tensor]]
"""Given a number of rows, returns so many 1-D tensors of token ids, of two tokens or more."""


def rollout_and_scores(
    query: TokenLists | Rollout,
    response: Any,
    scores: Any,
    response_masks: Any,
    *,
    config: PPOConfig,
    algorithm: Algorithm,
    start: Sequence[int] = (),
) -> tuple[Rollout, Tensor, Tensor | None]:
    """Return a rollout, its scores [B] or [B, R], 0 where no token counts, and which rows count.

    These are those on which the scores have a say, and in a group another row too, with which it
    can be compared; None: all.

    Args:
        query: See `PPOTrainer.step`, as for the next three.
        response: Likewise.
        scores: Likewise.
        response_masks: Likewise.
        config: Settings that the input must fit.
        algorithm: Likewise.
        start: What the decoder of an encoder-decoder begins with. `generate` returns it with the
            response: it is left out here, since the policy did not choose it.

    Raises:
        TypeError, ValueError: if they are not such, or not what settings and algorithm need.
    """
    if isinstance(query, Rollout):
        if response is not None and scores is not None:
            raise TypeError("`step(rollout, scores)` takes two arguments, got a third.")
        if response_masks is not None:
            refuse("response_masks", "be None beside a Rollout, which has a mask", error=TypeError)
        rollout, scores = query, response if scores is None else scores
        rollout.check()
    elif query is None or response is None:
        rule = "be tensors, or lists of tensors, of token ids"
        fix = "step(query, response, scores) or step(rollout, scores)"
        refuse("query` and `response", rule, fix=fix, error=TypeError)
    else:
        rollout = Rollout.from_lists(query, response, response_masks=response_masks)
    if scores is None:
        refuse("scores", "be given", fix="one number for each response", error=TypeError)
    counted = scores.counted if isinstance(scores, Scored) else None
    scores = scores.scores if isinstance(scores, Scored) else scores
    rollout, scores = _without_start(rollout, scores, start)
    mask = rollout.response_mask
    if isinstance(scores, Tensor) and scores.shape == mask.shape:
        scores = scores.masked_fill(~mask.to(scores.device), 0)
    scored = Scored.of(Scored(scores, counted=counted), rollout)
    scores, counted = scored.scores, scored.counted
    _check_settings(rollout, scores, config)
    if algorithm.groups:
        if rollout.group_ids is None:
            rule = f"say which responses answer the same query with {config.algorithm!r}"
            fix = "use Sampler(group_size=4), or Rollout.from_lists(group_ids=...)"
            refuse("group_ids", rule, "None", fix)
        group = numbered(rollout.group_ids.cpu())[0]  # or an error: at least two of each
        if counted is not None:
            counted &= torch.bincount(group[counted], minlength=len(group))[group] > 1
    return rollout, scores, counted


def _without_start(rollout: Rollout, scores: Any, start: Sequence[int]) -> tuple[Rollout, Any]:
    """Leave out the tokens that begin every response, if they are those of the start."""
    tokens, mask, size = rollout.responses, rollout.response_mask, len(start)
    begins = tokens[:, :size] == tokens.new_tensor(start)[: tokens.shape[1]]
    sampled = rollout.behaviour_logprobs is not None  # by one who knows
    if not size or sampled or not begins.all() or not mask[:, size:].any(1).all():
        return rollout, scores
    if isinstance(scores, Tensor) and scores.shape == mask.shape:
        scores = scores[:, size:]
    tokens, mask = tokens[:, size:], mask[:, size:]
    return replace(rollout, responses=tokens, response_mask=mask, values=None), scores


def _check_settings(rollout: Rollout, scores: Tensor, config: PPOConfig) -> None:
    """Raise unless the settings are for such responses and scores."""
    sampled, per_token = rollout.temperature, scores.ndim == 2
    if sampled is not None and not math.isclose(sampled, config.temperature, rel_tol=1e-6):
        rule = f"be the {sampled} that the responses were sampled with"
        fix = "every importance ratio would be wrong; give Sampler and PPOConfig the same number"
        refuse("temperature", rule, config.temperature, fix)
    if config.correction is not None and rollout.behaviour_logprobs is None:
        rule = "be None for responses that do not say what sampled them"
        fix = "give step a Rollout with behaviour_logprobs, as Sampler does"
        refuse("correction", rule, repr(config.correction), fix)
    if config.score_range is not None and per_token:
        rule = "be None with scores for single tokens, each of which it would move"
        fix = "scale them where they are made, or give one score for each response"
        refuse("score_range", rule, str(config.score_range), fix)
    if config.missing_eos_penalty is None:
        return
    if rollout.ended is None:
        rule = "be None for a rollout that does not say which responses `ended`"
        fix = "use Sampler, or dataclasses.replace(rollout, ended=...), [batch] bool"
        refuse("missing_eos_penalty", rule, fix=fix)
    if per_token:
        rule = "be None with scores for single tokens"
        fix = "put it on the last token of a response, or give one score for each response"
        refuse("missing_eos_penalty", rule, fix=fix)


def recorded_output(rollout: Rollout) -> ResponseOutput:
    """Return log-probs and values [B, R] that were recorded, as if the policy had just given them;
    what was not is 0.
    """
    logprobs, values = rollout.behaviour_logprobs, rollout.values
    assert logprobs is not None
    nothing = torch.zeros_like(logprobs)
    columns = logprobs, nothing if values is None else values, nothing
    # Without the graph that a user's own forward pass may have left: the ratio would go back
    # through both of its sides, and its gradient be 0.
    mask = rollout.response_mask
    logprobs, values, entropy = (torch.where(mask, x.detach().float(), 0.0) for x in columns)
    return ResponseOutput(logprobs, values, entropy)


def draw_texts(
    pretraining: Pretraining | None,
    config: PPOConfig,
    rows: int,
    update_rows: int,
    text_rows: int | None,
) -> list[Rollout]:
    """Draw the texts of each update of a step.

    Args:
        pretraining: Draws them.
        config: How many updates there are.
        rows: Of the step.
        update_rows: Most of them in one update.
        text_rows: Texts of each update; None: as many as it has rows.

    Raises:
        ValueError: if there is nothing to draw from.
    """
    if pretraining is None:
        rule = f"be given with pretraining_coef={config.pretraining_coef}"
        fix = "a function from a number of rows to so many 1-D tensors of token ids"
        refuse("pretraining", rule, None, f"pass PPOTrainer(..., pretraining=...) {fix}")
    sizes = [len(part) for part in torch.arange(rows).split(update_rows)] * config.ppo_epochs
    return [pretraining_rollout(pretraining, text_rows or size) for size in sizes]


def pretraining_rollout(pretraining: Pretraining, rows: int) -> Rollout:
    """Draw so many texts: all but the first token of each is what the model is to predict.

    Raises:
        TypeError, ValueError: if `pretraining` returns anything else.
    """
    texts = token_rows("pretraining", pretraining(rows))
    if len(texts) != rows:
        got = f"{len(texts)} for {rows}"
        refuse("pretraining", "return as many rows as it is asked for", got)
    for index, text in enumerate(texts):
        if len(text) < 2:
            rule = "have at least two tokens, one to predict another from"
            refuse(f"pretraining[{index}]", rule, str(len(text)), "leave the row out")
    return Rollout.from_lists([text[:1] for text in texts], [text[1:] for text in texts])
