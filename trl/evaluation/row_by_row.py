"""Score responses one by one, each with the value of a column of its row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from trl.batch import Rollout
from trl.config import closest
from trl.evaluation.cells import in_threads
from trl.evaluation.scores import ScoringError, failures_named, pairs_of
from trl.scored import Scored


class OneByOne(Protocol):
    """A scorer of single responses."""

    name: str
    key: str | None
    """The column; None: it needs none, and gets None for its values."""

    def score_one(self, response: str, value: Any, /) -> float:
        """Score a response."""
        ...


def score_rows(scorer: OneByOne, rollout: Rollout) -> Scored:
    """Score each response of a rollout, several at a time.

    Raises:
        ScoringError: if it has no such column, or the scorer raises.
    """
    responses = [response for _, response in pairs_of(rollout)]
    values = column_of(rollout, scorer.key, scorer.name)
    rows = list(zip(responses, values, strict=True))
    with failures_named(scorer.name, rollout):
        return Scored.of(in_threads(lambda row: scorer.score_one(*row), rows), rollout)


def column_of(rollout: Rollout, key: str | None, name: str) -> Sequence[Any]:
    """Return the values of a column; of none, None for each row.

    Raises:
        ScoringError: if the rollout has none of that name.
    """
    if key is None:
        return [None] * len(rollout)
    columns = rollout.columns or {}
    if problem := without_column(key, name, columns):
        raise ScoringError(problem)
    return columns[key]


def without_column(key: str, name: str, columns: Collection[str]) -> str:
    """Return a sentence if a scorer's column is not among those of the rows; nothing: it is."""
    if key in columns:
        return ""
    return (
        f"{name} must find the column {key!r} in the rows of the prompts, got {list(columns)}: "
        f"give rows such as {{'prompt': …, {key!r}: …}} (by hand: texts, {key}=[…]), or name "
        "another column." + closest(key, columns)
    )
