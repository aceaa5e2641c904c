"""What `step` is given: a rollout and its scores, checked against settings and algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trl.batch import Rollout, TokenLists, score_tensor, token_rows
from trl.config import PPOConfig
from trl.optimization.algorithms import Algorithm

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
) -> tuple[Rollout, Tensor]:
    """Return a rollout and its scores [B] or [B, R].

    Raises:
        TypeError, ValueError: if they are not such, or not what settings and algorithm need.
    """
    if isinstance(query, Rollout):
        if response is not None and scores is not None:
            raise TypeError("`step(rollout, scores)` takes two arguments, got a third.")
        if response_masks is not None:
            raise TypeError("`response_masks` must be None beside a Rollout, which has a mask.")
        rollout, scores = query, response if scores is None else scores
        rollout.check()
    elif query is None or response is None:
        raise TypeError(
            "`query` and `response` must be tensors, or lists of tensors, of token ids: "
            "step(query, response, scores) or step(rollout, scores)."
        )
    else:
        rollout = Rollout.from_lists(query, response, response_masks=response_masks)
    if scores is None:
        raise TypeError("`scores` must be given: one number for each response.")
    scores = score_tensor(scores, rollout)
    _check_temperature(rollout, config)
    if scores.ndim == 2 and config.center_scores:
        raise ValueError(
            "`center_scores` must be False with scores for single tokens: every token would "
            "get the same constant. Set it to False, or give one score for each response."
        )
    if config.missing_eos_penalty is not None:
        _check_ended(rollout, scores)
    if algorithm.groups:
        _check_groups(rollout, config)
    return rollout, scores


def _check_temperature(rollout: Rollout, config: PPOConfig) -> None:
    """Raise if the responses are known to be sampled at another temperature than is scored at."""
    sampled = rollout.temperature
    if sampled is not None and not math.isclose(sampled, config.temperature, rel_tol=1e-6):
        raise ValueError(
            f"`temperature` of the trainer must be the {sampled} that the responses were sampled "
            f"with, got {config.temperature}: every importance ratio would be wrong. Give "
            "Sampler and PPOConfig the same number."
        )


def _check_ended(rollout: Rollout, scores: Tensor) -> None:
    """Raise unless it is known of every response whether it ended, and it has one score."""
    if rollout.ended is None:
        raise ValueError(
            "`missing_eos_penalty` needs a rollout that says which responses `ended`, got one "
            "without: use Sampler, or dataclasses.replace(rollout, ended=...), [batch] bool."
        )
    if scores.ndim == 2:
        raise ValueError(
            "`missing_eos_penalty` must be None with scores for single tokens: put the penalty "
            "on the last token of a response yourself, or give one score for each response."
        )


def _check_groups(rollout: Rollout, config: PPOConfig) -> None:
    """Raise unless every query has several responses."""
    fix = (
        "sample several responses to each query with Sampler(group_size=4), or name the groups "
        "in Rollout.from_lists(group_ids=...)"
    )
    if rollout.group_ids is None:
        raise ValueError(
            f"`group_ids` of the rollout must be given with algorithm={config.algorithm!r}, which "
            f"compares the responses to one query, got None: {fix}."
        )
    names, sizes = rollout.group_ids.unique(return_counts=True)
    if bool((sizes < 2).any()):
        raise ValueError(
            f"`group_ids` must have at least 2 responses in each group with "
            f"algorithm={config.algorithm!r}, got 1 in group(s) {names[sizes < 2].tolist()[:8]}: "
            f"{fix}."
        )


def pretraining_rollout(pretraining: Pretraining, rows: int) -> Rollout:
    """Draw so many texts: all but the first token of each is what the model is to predict.

    Raises:
        TypeError, ValueError: if `pretraining` returns anything else.
    """
    texts = token_rows("pretraining", pretraining(rows))
    if len(texts) != rows:
        raise ValueError(
            f"`pretraining` must return as many rows as it is asked for, got {len(texts)} for "
            f"{rows}."
        )
    for index, text in enumerate(texts):
        if len(text) < 2:
            raise ValueError(
                f"`pretraining[{index}]` must have at least two tokens, one to predict another "
                f"from, got {len(text)}: leave the row out."
            )
    return Rollout.from_lists([text[:1] for text in texts], [text[1:] for text in texts])
