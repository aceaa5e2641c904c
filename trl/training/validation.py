"""Whether rewards tell right answers from wrong ones, before a run is spent on them.

validate("questions.jsonl", (RewardConfig(kind="math", arguments={"key": "answer"}),))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trl.batch import Rollout
from trl.config.code import Trust
from trl.config.errors import closest, refuse, shown
from trl.config.recipe import RewardConfig
from trl.data.sources import read_table
from trl.evaluation.scores import name_of, score
from trl.training.named import load_scorer

WRONG = 4
"""Other rows whose answer is tried as a wrong one, at most: some have the same answer, written in
another way."""
EXAMPLES = 3
"""Rows that are shown of each problem."""

Columns = dict[str, Sequence[Any]]


def validate(
    source: str, rewards: Sequence[RewardConfig], column: str = "", trust: Trust = ()
) -> int:
    """Score the right answers of a table, and those of other rows; print how that went.

    Args:
        source: A file or dataset.
        rewards: Of which those are checked that compare with something or run tests.
        column: With the right answers, as whole responses. None given: they are made of the values
            that a reward compares with.
        trust: Modules and packages whose functions may run.

    Returns:
        0 if each right answer scores 1, and each wrong one 0; else 1.

    Raises:
        ValueError: if there is no such column, or nothing to check.
    """
    table = read_table(source, name="TEXTS")
    columns = {name: table.column(name) for name in table.names}
    if column and column not in columns:
        hint = closest(column, columns)
        refuse("--validate", f"name a column of {source}, one of {list(columns)}", column + hint)
    _, judge = load_scorer(rewards, trust)
    scorers = [scorer for scorer, _ in judge.parts.values() if hasattr(scorer, "key")]
    if not scorers:
        kinds = [reward.kind for reward in rewards]
        refuse("reward", "have a kind that checks: math, code, json or regex", kinds)
    told = [problem for scorer in scorers for problem in problems_of(scorer, columns, column)]
    for line in told or [f"{table.size} right answers score 1, and those of other rows 0."]:
        print(line)
    return int(bool(told))


def problems_of(scorer: Any, columns: Columns, column: str = "") -> list[str]:
    """Return what a scorer gets wrong, in words.

    Args:
        scorer: Has `key`, the column that it compares with, or None if it reads none; and, where
            an answer can be made of a value of it, a method `right`.
        columns: Of the table.
        column: With the right answers; none: they are made of `key`.
    """
    name = name_of(scorer)
    if column:
        rights = [str(value) for value in columns[column]]
    elif scorer.key in columns and hasattr(scorer, "right"):
        rights = [scorer.right(value) for value in columns[scorer.key]]
    else:
        refuse(
            "--validate", f"name the column with right answers for {name}", fix=f"{list(columns)}"
        )
    every = list(range(len(rights)))
    scores = _scores(scorer, rights, columns, every)
    found = _told(name, "right", {row: rights[row] for row in every if scores[row] != 1}, 1)
    if scorer.key is None:  # nothing makes the answer of another row a wrong one
        return found
    tried: dict[int, str] = {}
    suspects = every
    for step in range(1, WRONG + 1):
        others = {row: rights[(row + step) % len(rights)] for row in suspects}
        others = {row: wrong for row, wrong in others.items() if wrong != rights[row]}
        tried |= others
        scores = _scores(scorer, list(others.values()), columns, list(others))
        good = {row for row, one in zip(others, scores, strict=True) if one == 0}
        suspects = [row for row in suspects if row not in good]
    if not tried:
        return [*found, f"{name}: all right answers are the same, there is no wrong one to try."]
    return found + _told(name, "wrong", {row: tried[row] for row in suspects if row in tried}, 0)


def _scores(scorer: Any, texts: list[str], columns: Columns, rows: list[int]) -> list[float]:
    """Return the scores of texts as the responses of rows."""
    if not texts:
        return []
    none = torch.zeros(len(texts), 1, dtype=torch.long)  # tokens that stand for none
    rollout = replace(
        Rollout.from_lists(none, none),
        query_texts=("",) * len(texts),
        response_texts=tuple(texts),
        columns={name: tuple(values[row] for row in rows) for name, values in columns.items()},
    )
    return score(scorer, rollout).totals.tolist()


def _told(name: str, kind: str, failed: dict[int, str], wanted: int) -> list[str]:
    if not failed:
        return []
    some = ", ".join(
        f"row {row + 1}: {shown(text)}" for row, text in list(failed.items())[:EXAMPLES]
    )
    more = f", and {len(failed) - EXAMPLES} more" if len(failed) > EXAMPLES else ""
    return [f"{name}: {len(failed)} {kind} answers do not score {wanted}: {some}{more}."]
