"""A Python function as a scorer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, Literal

import torch

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse, shown
from trl.evaluation.scores import (
    Scorer,
    ScoringError,
    failures_named,
    name_of,
    pairs_of,
    result_of,
    texts_of,
)
from trl.scored import Scored

__all__ = ["FunctionScorer", "as_scorer"]

On = Literal["texts", "pairs", "tokens"]

READERS: dict[str, Callable[[Rollout], list[Any]]] = {
    "texts": texts_of,
    "pairs": pairs_of,
    "tokens": Rollout.response_lists,
    "prompts": lambda rollout: [query for query, _ in pairs_of(rollout)],
    "completions": lambda rollout: [response for _, response in pairs_of(rollout)],
}
"""What makes the lists of a function: the first three by `on`, the others by name."""

OF_TRL = ("prompts", "completions")
"""Names of parameters that TRL's reward functions have."""


class FunctionScorer:
    """Scores from a function that sees the whole batch at once.

        scorer = FunctionScorer(lambda texts: [float(len(text)) for text in texts])

    What the function gets, a list with one entry for each of the B responses:

        on="texts"   str                query and response as one text
        on="pairs"   tuple[str, str]    query and response
        on="tokens"  list[int]          the counted token ids of the response: with its EOS, without
                                        padding and without what the policy did not write itself

    Its other parameters are named after columns of the rows that the prompts came from, and get
    B values of them; `**others` gets all columns that have no parameter:

        def right(pairs, answer):
            return [float(a in response) for (_, response), a in zip(pairs, answer)]

    As in TRL, a parameter `prompts` gets the texts of the queries and `completions` those of the
    responses; the first one too, unless `on` says otherwise.

    A function of anything else in a rollout is a scorer already: `def mine(rollout) -> Tensor`, or
    `-> Scored` if it has more to tell.

    What it returns: B numbers, or B lists of numbers, one for each counted token of the response. A
    list, a tensor or an array will do.

    The function may be `async def`. Each call has an event loop of its own, so that a client which
    belongs to a loop must be opened inside the function.

    Args:
        function: of lists, see above.
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
        self._asks = _parameters(function, on)

    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response, or each of its tokens.

        Raises:
            ScoringError: if the function raises or does not return what it should, or asks for a
                column that the rollout does not have.
        """
        first = self._asks[0].name
        by_name = self.on == "texts" and first in OF_TRL
        batch = READERS[first if by_name else self.on](rollout)
        more = self._columns(rollout)
        with failures_named(self.name, rollout):
            return Scored.of(result_of(self.function(batch, **more)), rollout)

    def _columns(self, rollout: Rollout) -> dict[str, list[Any]]:
        """Return what the parameters after the first get, by their names."""
        there = {name: list(values) for name, values in (rollout.columns or {}).items()}
        taken = {each.name for each in self._asks}
        more: dict[str, list[Any]] = {}
        for parameter in self._asks[1:]:
            name = parameter.name
            if parameter.kind is Parameter.VAR_KEYWORD:
                more |= {column: there[column] for column in there.keys() - taken}
            elif name in there or name in OF_TRL:
                more[name] = there[name] if name in there else READERS[name](rollout)
            elif parameter.default is Parameter.empty:
                raise ScoringError(
                    f"{self.name} must ask for columns of the prompts' rows, got `{name}`: the "
                    f"columns are {list(there)}. Prompts with columns are rows, such as "
                    f"{{'prompt': ..., {name!r}: ...}}; for (query, response) pairs use "
                    "FunctionScorer(function, on='pairs')."
                )
        return more


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
        refuse("reward", "be a scorer or a function", shown(reward), fix, error=TypeError)
    return reward if _takes_a_rollout(reward) else FunctionScorer(reward)


def _parameters(function: Callable[..., Any], on: On) -> list[Parameter]:
    """Return the parameters of a function: that of its list, and those that get columns.

    Raises:
        TypeError: if it cannot be called with a list, and the others by name.
    """
    signature = _signature(function)
    if signature is None:
        return [Parameter("_", Parameter.POSITIONAL_ONLY)]
    every = list(signature.parameters.values())
    by_name = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    named = {each.name: None for each in every[1:] if each.kind in by_name}
    try:
        signature.bind(None, **named)
        fits = every[0].name != "self"  # a method without its object
    except TypeError:
        fits = False
    if not fits:
        what = {"texts": "texts", "pairs": "(query, response) pairs", "tokens": "token lists"}[on]
        fix = f"it gets one list of {what}, and columns by the names of its other parameters"
        got = f"{name_of(function)}{signature}"
        refuse("function", "take a list first", got, fix, error=TypeError)
    others = [each for each in every[1:] if each.kind in {*by_name, Parameter.VAR_KEYWORD}]
    return [every[0], *others]


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the parameters of a function; None: some written in C do not tell theirs."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes_a_rollout(function: Callable[..., Any]) -> bool:
    signature = _signature(function)
    first = next(iter(signature.parameters.values()), None) if signature else None
    return first is not None and (first.name == "rollout" or "Rollout" in str(first.annotation))
