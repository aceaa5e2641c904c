"""A Python function as a scorer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse
from trl.evaluation.scores import (
    Scorer,
    failures_named,
    name_of,
    pairs_of,
    result_of,
    texts_of,
)
from trl.scored import Scored, shorten

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

    A function of anything else in a rollout is a scorer already: `def mine(rollout) -> Tensor`, or
    `-> Scored` if it has more to tell.

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
            refuse("function", "be callable", type(function).__name__, error=TypeError)
        check_values("FunctionScorer", {"on": (On, on)})
        self.function = function
        self.on = on
        self.name = name or name_of(function)
        _check_takes_one(function, on)

    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response, or each of its tokens.

        Raises:
            ScoringError: if the function raises or does not return what it should.
        """
        read = {"texts": texts_of, "pairs": pairs_of, "tokens": Rollout.response_lists}[self.on]
        batch = read(rollout)
        with failures_named(self.name, rollout):
            return Scored.of(result_of(self.function(batch)), rollout)


def as_scorer(reward: Scorer | Callable[[list[str]], Any]) -> Scorer:
    """Return a scorer as it is, and a function of texts as a `FunctionScorer`.

    A scorer is known by its first parameter: it is called `rollout`, or its type is `Rollout`.
    """
    if not callable(reward) or isinstance(reward, type | torch.nn.Module):
        fix = (
            "pass a function of a list of texts, FunctionScorer(function, on=...), "
            "ClassifierScorer(model, label=...), RewardModelScorer(model), EndpointScorer(url), "
            "or a function of a `rollout`"
        )
        refuse("reward", "be a scorer or a function", shorten(reward), fix, error=TypeError)
    return reward if _takes_a_rollout(reward) else FunctionScorer(reward)


def _check_takes_one(function: Callable[..., Any], on: On) -> None:
    """Raise a TypeError unless the function can be called with one list."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell theirs
        return
    try:
        signature.bind([])
    except TypeError:
        name = name_of(function)
        what = {"texts": "texts", "pairs": "(query, response) pairs", "tokens": "token lists"}[on]
        fix = f"it gets one list of {what}"
        if on == "texts":
            fix += f"; for (query, response) pairs use FunctionScorer({name}, on='pairs')"
        refuse("function", "take one argument", f"{name}{signature}", fix, error=TypeError)


def _takes_a_rollout(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C do not tell theirs
        return False
    return bool(parameters) and (
        parameters[0].name == "rollout" or "Rollout" in str(parameters[0].annotation)
    )
