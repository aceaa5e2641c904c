"""A Python function as a scorer."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from inspect import Parameter
from typing import Any, Literal

import torch
from torch import Tensor

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import closest, refuse, shown
from trl.config.types import Text
from trl.evaluation.scores import (
    Finish,
    Scorer,
    ScoringError,
    by_hand,
    failures_named,
    has_tokens,
    name_of,
    pairs_of,
    result_of,
    texts_of,
)
from trl.evaluation.steps import SEPARATOR, of_steps, steps_of_rows
from trl.scored import Scored, number_entries

__all__ = ["FunctionScorer", "as_scorer"]

On = Literal["texts", "pairs", "tokens"]


def _messages(rollout: Rollout) -> list[Any]:
    """Return each query as TRL's functions get it: its text, or the messages of a chat."""
    return list(rollout.query_messages or _queries(rollout))


def _answers(rollout: Rollout) -> list[Any]:
    """Return each response likewise: its text, or one message of the assistant."""
    if rollout.episodes is not None:
        return [list(episode["messages"]) for episode in rollout.episodes]
    texts = _responses(rollout)
    if rollout.query_messages is None:
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]


def _queries(rollout: Rollout) -> list[str]:
    return [query for query, _ in pairs_of(rollout)]


def _responses(rollout: Rollout) -> list[str]:
    return [response for _, response in pairs_of(rollout)]


def _tokens(rollout: Rollout) -> list[list[int]]:
    if not has_tokens(rollout):
        raise ScoringError(
            "the rollout must have tokens for a function that reads them, and was made of texts: "
            "give the function lists of token ids by hand, or the scorer a rollout of a Sampler."
        )
    return rollout.response_lists()


def _step_texts(rollout: Rollout, separator: str) -> list[list[str]]:
    return [[step.text for step in own] for own in steps_of_rows(rollout, separator)]


STEPS = "response_steps"
READERS: dict[str, Callable[[Rollout], Any]] = {
    "texts": texts_of,
    "pairs": pairs_of,
    "tokens": _tokens,
    "queries": _queries,
    "responses": _responses,
    "prompts": _messages,
    "completions": _answers,
    "completion_ids": _tokens,
    "completions_ids": _tokens,  # as some pages of TRL call them
    "environments": lambda rollout: list(rollout.environments or [None] * len(rollout)),
    "rollout": lambda rollout: rollout,
    STEPS: lambda rollout: _step_texts(rollout, SEPARATOR),
}
"""What makes the lists of a function: by `on`, and by the names of its parameters."""

LOGGERS = "log_metric", "log_extra"
"""Functions that TRL gives to a reward function that asks for them."""

VARIABLE = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


class FunctionScorer:
    """Scores from a function that sees the whole batch at once.

        scorer = FunctionScorer(lambda texts: [float(len(text)) for text in texts])

    What the function gets, a list with one entry for each of the B responses:

        on="texts"   str                query and response as one text
        on="pairs"   tuple[str, str]    query and response
        on="tokens"  list[int]          the counted token ids of the response: with its EOS, without
                                        padding and without what the policy did not write itself

    A function is known by the names of its parameters, too. With one of these names, wherever it
    stands, it gets

        texts            query and response as one text; so does a first one of any other name, if
                         no other parameter has one of these
        queries          the queries alone, and `responses` the responses
        prompts          as in TRL: the queries, the messages of those that are chats
        completions      as in TRL: the responses, for chats each as [{"role": "assistant", …}],
                         with an environment as the messages of the whole conversation
        environments     as in TRL: the environments of `Episodes`, as they were left
        completion_ids   the token ids of the responses, as on="tokens"
        rollout          the whole `Rollout`
        response_steps   the steps of the responses, a list of texts for each; it returns a list of
                         as many numbers for each, see `trl.evaluation.steps.of_steps`
        log_metric       log_metric(name, number): a figure of the batch
        log_extra        log_extra(name, numbers): a figure of each response; or texts, which stand
                         beside the samples of an evaluation

    and its others are named after columns of the rows that the prompts came from, of which they get
    B values; `**others` gets all columns that have no parameter:

        def right(queries, responses, answer):
            return [float(a in response) for response, a in zip(responses, answer)]

    The text of a chat is what its messages say, a blank line between two, the answer last: without
    roles, and without what a chat template adds.

    A function of the rollout alone is a scorer already, `def mine(rollout) -> Tensor`, or
    `-> Scored` if it has more to tell.

    What it returns: B numbers, or B lists of numbers, one for each counted token of the response,
    or of its steps. A list, a tensor or an array will do. None in a list: no say on that row.

    The function may be `async def`; several of a sum are waited for together. Each batch has an
    event loop of its own, so that a client which belongs to a loop must be opened inside.

    Args:
        function: of lists, see above.
        on: what the list holds.
        separator: what ends a step, for a function that asks for `response_steps`.
        name: for messages and metrics. Default: that of the function.
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Any],
        *,
        on: On = "texts",
        separator: str = SEPARATOR,
        name: str | None = None,
    ) -> None:
        if not callable(function):
            refuse("function", "be callable", type(function).__name__, error=TypeError)
        checks = {"on": (On, on), "separator": (Text, separator)}
        check_values("FunctionScorer", checks)
        self.function = function
        self.on, self.separator = on, separator
        self.name = name or name_of(function)
        self._asks = _parameters(function, on)
        self._readers = _readers(self._asks, on)
        if STEPS in self._readers:
            self._readers[STEPS] = partial(_step_texts, separator=separator)
        elif separator != SEPARATOR:
            rule = f"be left out for a function without a parameter `{STEPS}`"
            refuse("separator", rule, repr(separator))

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response, or each of its tokens.

        Raises:
            ScoringError: if the function raises or does not return what it should, or asks for a
                column that the rollout does not have.
        """
        given, finish = self.begin_scoring(rollout)
        with failures_named(self.name, rollout):
            return finish(result_of(given))

    def begin_scoring(self, rollout: Rollout) -> tuple[Any, Finish]:
        """Call the function; return what it gives, or is to be waited for, and what scores that.

        So that several are waited for together, see `score_all`.
        """
        if problem := self.missing(rollout.columns or {}):
            raise ScoringError(problem)
        figures, notes = dict[str, Tensor](), dict[str, tuple[str, ...]]()
        lists = self._lists(rollout, partial(_keep, figures, notes, len(rollout)))
        first = [lists.pop(name) for name in [self._asks[0].name] if name in lists]

        def finish(given: Any) -> Scored:
            if STEPS in self._readers:
                given = of_steps(given, rollout, steps_of_rows(rollout, self.separator))
            found = Scored.of(given, rollout)
            kept = {**found.figures, **figures}
            return replace(found, figures=kept, notes={**found.notes, **notes})

        with failures_named(self.name, rollout):
            return self.function(*first, **lists), finish

    def missing(self, columns: Collection[str]) -> str:
        """Return what the function asks for that rows with these columns lack; nothing: nothing."""
        for each in self._asks:
            name = each.name
            free = each.default is not Parameter.empty or each.kind is Parameter.VAR_KEYWORD
            if not (free or name in self._readers or name in LOGGERS or name in columns):
                known = [each for each in (*READERS, *LOGGERS) if each != "completions_ids"]
                of_rows = f"the columns {', '.join(columns)}" if columns else "no columns"
                return (
                    f"{self.name} asks for `{name}`, which must be a column of the rows that are "
                    f"scored, got rows with {of_rows}: give rows such as {{'prompt': ..., "
                    f"{name!r}: ...}} (by hand: texts, {name}=[...]), or ask for one of "
                    f"{', '.join(known)}.{closest(name, [*known, *columns])}"
                )
        return ""

    def _lists(self, rollout: Rollout, kept: Callable[..., None]) -> dict[str, Any]:
        """Return what the parameters get, by their names."""
        there = {name: list(values) for name, values in (rollout.columns or {}).items()}
        others = there.keys() - {each.name for each in self._asks}
        lists: dict[str, Any] = {}
        for parameter in self._asks:
            name = parameter.name
            if parameter.kind is Parameter.VAR_KEYWORD:
                lists |= {column: there[column] for column in others}
            elif name in self._readers:
                if name in there:
                    told = (
                        f"{self.name} gets what a `Rollout` has under the name `{name}`, not the "
                    )
                    told += "column that the rows have: call that another name if it is meant."
                    warnings.warn(told, stacklevel=3)
                lists[name] = self._readers[name](rollout)
            elif name in there or name in LOGGERS:
                lists[name] = there.get(name, kept)
        return lists


def _readers(asks: list[Parameter], on: On) -> dict[str, Callable[[Rollout], Any]]:
    """Return what makes the lists of the parameters that are not columns, by their names."""
    found = {each.name: READERS[each.name] for each in asks if each.name in READERS}
    first = asks[0]
    if "Rollout" in str(first.annotation):
        found[first.name] = READERS["rollout"]
    elif on != "texts" or not found:
        found[first.name] = READERS[on]
    return found


def _keep(
    figures: dict[str, Tensor],
    notes: dict[str, tuple[str, ...]],
    rows: int,
    name: str,
    value: Any,
) -> None:
    """Keep a figure of all rows, or what is known of each: numbers, or else texts."""
    each_has = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
    values = list(value) if each_has else [value] * rows
    words = [each for each in values if each is not None and not hasattr(each, "__float__")]
    if words and len(values) == rows:
        notes[str(name)] = tuple("" if each is None else str(each) for each in values)
        return
    numbers = [math.nan if x is None else x for x in number_entries(values, rows, none=True)]
    figures[str(name)] = torch.tensor(numbers, dtype=torch.float32, device="cpu")


def as_scorer(reward: Scorer | Callable[[list[str]], Any]) -> Scorer:
    """Return a scorer as it is, and a function of texts as a `FunctionScorer`.

    A scorer is known by its first parameter: it is called `rollout`, or its type is `Rollout`, and
    there is no other.
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
    if not signature or not signature.parameters:
        return False
    first, *others = signature.parameters.values()
    free = all(each.default is not Parameter.empty or each.kind in VARIABLE for each in others)
    named = first.name == "rollout" or "Rollout" in str(first.annotation)
    return named and free  # else the others are columns
