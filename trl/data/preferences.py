"""What people preferred among the responses to a prompt: files read, broken rows named.

A row is one of

    {"prompt": …, "chosen": …, "rejected": …, "margin": 1.5, "weight": 2}
    {"prompt": …, "responses": [a, b, …], "votes": [{"annotator": "ann", "answer": 1}, …]}

Prompts and responses are texts, or lists of messages. The prompt may be left out where chosen and
rejected hold it. Margin and weight may be left out. An answer is the index of a response, `tie` or
`both_bad`, which both say that no response is better; any other one (skipped), and a vote with
`undone`, says nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.config.errors import problem, refuse, shown
from trl.data.sources import HALF_A_PAIR, read_table
from trl.evaluation.scores import PARAGRAPH, words_of

__all__ = ["Preference", "as_read", "read_preferences"]

TIES = ("tie", "both_bad")

Said = str | Sequence[Mapping[str, Any]]
"""A text, or messages."""


@dataclass(frozen=True, slots=True)
class Preference:
    """How people chose among the responses to a prompt."""

    prompt: Said
    responses: tuple[Said, ...]
    votes: tuple[float, ...]
    """For each response, and last those for none."""
    margin: float = 0.0
    """By how much the chosen one is better."""

    @property
    def key(self) -> str:
        """The same for the same responses in any order."""
        return json.dumps([self.prompt, sorted(map(json.dumps, self.responses))])


def read_preferences(
    source: str, *, subset: str | None = None, name: str = "train"
) -> tuple[list[Preference], list[str]]:
    """Read all rows that can be read.

    Args:
        source: A file, a folder or a hub dataset, see `trl.data.sources`.
        subset: Configuration of a hub dataset.
        name: What errors call the source.

    Returns:
        What was preferred, of rows with at least one vote; and what is wrong with the other rows, a
        sentence for each.

    Raises:
        FileNotFoundError, ImportError, ValueError: if it cannot be read, or no row can.
    """
    found, problems = list[Preference](), list[str]()
    for place, row in _rows(source, subset, name):
        try:
            preference = _preference(row)
        except (TypeError, ValueError) as error:
            problems.append(f"{place}: {error}")
        else:
            if sum(preference.votes):
                found.append(preference)
            else:
                problems.append(f"{place}: " + problem("votes", "say something", "no answer"))
    if not found:
        told = problems[0] if problems else "it is empty"
        refuse(name, "have preferences", f"{source!r}, of which no row can be read ({told})")
    return found, problems


def as_read(prompt: Said, response: Said) -> tuple[list[Mapping[str, Any]], tuple[str, str]]:
    """Return what a reward model reads: messages and the answer; as texts, query and response."""
    plain = isinstance(prompt, str) and isinstance(response, str)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if not isinstance(response, str):
        chat = [] if prompt == "" else chat
        chat, response = [*chat, *response[:-1]], words_of(response[-1])
    if plain:
        return chat, (str(prompt), response)
    begun = bool(chat) and chat[-1]["role"] == "assistant"  # an answer that is gone on with
    query = PARAGRAPH.join(map(words_of, chat)) + ("" if begun or not chat else PARAGRAPH)
    return chat, (query, response)


def _rows(source: str, subset: str | None, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each row after where it stands; a line that is no JSON as the text that it is."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (RecursionError, ValueError):
                    row = line.decode(errors="replace")
                yield f"line {number} of {source}", row
        return
    table = read_table(source, subset=subset, name=name)
    columns = {each: table.column(each) for each in table.names}
    for row in range(table.size):
        yield table.place(row), {each: column[row] for each, column in columns.items()}


def _preference(row: Any) -> Preference:
    """Return what a row says, or raise a ValueError or TypeError that names what is wrong."""
    if not isinstance(row, dict):
        refuse("row", "be an object of JSON", shown(row))
    prompt = "" if row.get("prompt") is None else _said(row["prompt"], "prompt")
    if row.get("votes") is None:
        if lacking := [each for each in ("chosen", "rejected") if each not in row]:
            rule = "have `chosen` and `rejected` (or `responses` and `votes`)"
            refuse("row", rule, f"the columns {list(row)}, without {lacking}")
        responses = [_said(row.get(each), each) for each in ("chosen", "rejected")]
        votes = [1.0, 0.0, 0.0]
    else:
        if not isinstance(row.get("responses"), list | tuple) or len(row["responses"]) < 2:
            refuse("responses", "be a list of at least two", shown(row.get("responses")))
        said = enumerate(row["responses"])
        responses = [_said(each, f"responses[{index}]") for index, each in said]
        votes = _votes(row["votes"], len(responses))
    margin, weight = _number(row, "margin", 0.0), _number(row, "weight", 1.0)
    votes = [weight * vote for vote in votes]
    return Preference(prompt, tuple(responses), tuple(votes), margin)


def _said(value: Any, name: str) -> Said:
    """Check a text, or messages."""
    if isinstance(value, str):
        if HALF_A_PAIR.search(value):
            refuse(name, "be valid Unicode", shown(value))
        return value
    messages = [value] if isinstance(value, dict) else value
    good = isinstance(messages, list | tuple) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str | list)
        and not HALF_A_PAIR.search(words_of(each))
        for each in messages
    )
    if not good or not messages:
        refuse(name, "be a text, or messages with role and content, of valid Unicode", shown(value))
    return tuple(messages)


def _votes(votes: Any, count: int) -> list[float]:
    """Count the votes for each response, and for none."""
    counts = [0.0] * (count + 1)
    if not isinstance(votes, list | tuple) or not all(isinstance(each, dict) for each in votes):
        refuse("votes", "be a list of objects with an answer", shown(votes))
    for index, vote in enumerate(votes):
        answer = vote.get("answer")
        if vote.get("undone"):
            continue
        if isinstance(answer, int) and not isinstance(answer, bool):
            if not 0 <= answer < count:
                rule = f"be an index of the {count} responses"
                refuse(f"votes[{index}].answer", rule, shown(answer))
            counts[answer] += 1
        elif answer in TIES:
            counts[-1] += 1
    return counts


def _number(row: dict[str, Any], name: str, default: float) -> float:
    """Return a number of at least 0, which a table may have as a text."""
    value = row.get(name)
    if value is None or value == "":
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        refuse(name, "be a number >= 0", shown(value))
    return number
