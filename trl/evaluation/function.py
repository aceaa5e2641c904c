"""A Python function as a scorer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trl.batch import Rollout
from trl.evaluation.scores import (
    Scorer,
    check_scores,
    failures_named,
    lay_out,
    name_of,
    pairs_of,
    read_entries,
    result_of,
    texts_of,
)

__all__ = ["FunctionScorer", "as_scorer"]

On = Literal["texts", "pairs", "tokens"]


class FunctionScorer:
    """Scores from a function that sees the whole batch at once.

        scorer = FunctionScorer(lambda texts: [float(len(text)) for text in texts])

    What the function gets, a list with one entry for each of the B responses:

        on="texts"   str                query and response as one text
        on="pairs"   tuple[str, str]    query and response
        on="tokens"  list[int]          the counted token ids of the response: with its EOS, without
                                        padding and without what the policy did not write itself

    A function of anything else in a rollout is a scorer already: `def mine(rollout) -> Tensor`.

    What it returns: B numbers, or B lists of numbers, one for each counted token of the response. A
    list, a tensor or an array will do.

    The function may be `async def`. Each call has an event loop of its own, so that a client which
    belongs to a loop must be opened inside the function.

    Args:
        function: of one list.
        on: what the list holds.
        name: for messages and metrics. Default: that of the function.
    """

    def __init__(
        self, function: Callable[[list[Any]], Any], *, on: On = "texts", name: str | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"`function` must be callable, got {type(function).__name__}.")
        if on not in get_args(On):
            raise ValueError(f"`on` must be one of {get_args(On)}, got {on!r}.")
        self.function = function
        self.on = on
        self.name = name or name_of(function)
        _check_takes_one(function, on)

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score each response.

        Returns:
            scores [B], or rewards [B, R] that are 0 outside the response mask; float32, CPU.
        Raises:
            ScoringError: if the function raises or does not return what it should.
        """
        batch: list[Any]
        if self.on == "texts":
            batch = texts_of(rollout)
        elif self.on == "pairs":
            batch = pairs_of(rollout)
        else:
            batch = rollout.response_lists()
        with failures_named(self.name, rollout):
            found = result_of(self.function(batch))
            entries = read_entries(found, rollout, range(len(rollout)), self.name, of=self.on)
            scores = lay_out(entries, rollout, self.name)
        return check_scores(scores, rollout, self.name)


def as_scorer(reward: Scorer | Callable[[list[str]], Any]) -> Scorer:
    """Return a scorer as it is, and a function of texts as a `FunctionScorer`.

    A scorer is known by its first parameter: it is called `rollout`, or its type is `Rollout`.
    """
    choices = (
        "pass a function of a list of texts, FunctionScorer(function, on=...), "
        "ClassifierScorer(model, label=...), RewardModelScorer(model), EndpointScorer(url), or a "
        "function of a `rollout`"
    )
    if isinstance(reward, (str, os.PathLike)):
        raise TypeError(
            f"`reward` must be a scorer or a function, got {os.fspath(reward)!r}, which does not "
            f"say what to do with it: {choices}."
        )
    if not callable(reward) or isinstance(reward, (type, torch.nn.Module)):
        what = reward.__name__ if isinstance(reward, type) else type(reward).__name__
        kind = "the class" if isinstance(reward, type) else "an object of the class"
        raise TypeError(f"`reward` must be a scorer or a function, got {kind} {what}: {choices}.")
    return reward if _takes_a_rollout(reward) else FunctionScorer(reward)


def _check_takes_one(function: Callable[..., Any], on: On) -> None:
    """Raise a TypeError unless the function can be called with one list."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell theirs
        return
    try:
        signature.bind([])
    except TypeError as error:
        name = name_of(function)
        what = {"texts": "texts", "pairs": "(query, response) pairs", "tokens": "token lists"}[on]
        fix = ""
        if on == "texts":
            fix = f"; for (query, response) pairs use FunctionScorer({name}, on='pairs')"
        raise TypeError(
            f"`function` must take one argument, got {name}{signature}: it gets one list of "
            f"{what}{fix}."
        ) from error


def _takes_a_rollout(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C do not tell theirs
        return False
    return bool(parameters) and (
        parameters[0].name == "rollout" or "Rollout" in str(parameters[0].annotation)
    )
