"""Score what a response must look like: JSON by its schema, text by a pattern or by its parts.

JsonScorer(schema={"type": "object", "required": ["name"]})
RegexScorer(r"#### (-?[0-9]+)", key="answer")
FormatScorer(["think", "answer"])
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse, shown
from trl.config.types import Positive, Text, Texts
from trl.evaluation.cells import ask
from trl.evaluation.row_by_row import score_rows
from trl.evaluation.scores import by_hand, pairs_of
from trl.scored import Scored

__all__ = ["FormatScorer", "JsonScorer", "RegexScorer"]

MOST_READ = 2**20
"""Characters of a response; a longer one is not looked at."""


def responses_of(rollout: Rollout) -> list[str]:
    """Return the texts of the responses."""
    return [response for _, response in pairs_of(rollout)]


class JsonScorer:
    """1 if a response is the JSON that it must be, else 0.

    The response must be one JSON value and nothing else, or hold it in its last block ``` … ```.
    NaN, Infinity and an object with the same name twice are no JSON, and true is not 1. It is
    looked at in a process that ends with its time, with jsonschema (the extra `json`).

    Args:
        schema: JSON Schema that it must fit. A $ref to another place is not followed.
        key: Column of the values that it must be equal to: JSON as text, or what that stands for.
        seconds: Most time for a response.
        name: For messages and metrics.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | None = None,
        key: str | None = None,
        *,
        seconds: float = 2.0,
        name: str = "json",
    ) -> None:
        check_values("JsonScorer", {"key": (Text | None, key), "seconds": (Positive, seconds)})
        if importlib.util.find_spec("jsonschema") is None:
            raise ImportError("JsonScorer needs jsonschema: pip install jsonschema.")
        if not isinstance(schema, Mapping | None) or (schema is None and key is None):
            refuse("schema", "be a JSON Schema as a dict", shown(schema), "or give `key`")
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        try:
            self.schema = json.loads(json.dumps({} if schema is None else schema))
            validator_for(self.schema).check_schema(self.schema)
        except (TypeError, ValueError, SchemaError) as error:
            refuse("schema", "be a JSON Schema", f"{getattr(error, 'message', error)}")
        self.key, self.seconds, self.name = key, seconds, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response.

        Raises:
            ScoringError: if there is no such column.
        """
        return score_rows(self, rollout)

    def right(self, value: Any) -> str:
        """Return a response that is right, for a value of the column."""
        return json.dumps(_value(value))

    def score_one(self, response: str, value: Any) -> float:
        """Score a response, given the value of its row if there is a column."""
        text = last_block(response)
        if len(text) > MOST_READ:
            return 0.0
        # Two of them: a $ref of the one that was given may start at its root, #.
        schemas = [self.schema] if self.key is None else [self.schema, {"const": _value(value)}]
        given = {"text": text, "schemas": schemas}
        return float(ask("json", ["jsonschema"], self.seconds, **given) is True)


def _value(value: Any) -> Any:
    """Return a value of a column; of a text, what it is as JSON, if it is that."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def last_block(text: str) -> str:
    """Return what is in the last block ``` … ``` of a text, or all of it if there is none."""
    parts = text.split("```")
    if len(parts) < 3:
        return text
    first, newline, rest = parts[(len(parts) - 1) // 2 * 2 - 1].partition("\n")
    # What stands beside the opening is the name of a language.
    return rest if newline and re.fullmatch(r"[\w+-]*\s*", first) else first + newline + rest


class RegexScorer:
    """1 if a response matches a pattern, and what it finds is right; else 0.

    Args:
        pattern: Regular expression that is searched for, as `re.search` does; it runs in a process
            that ends with its time.
        key: Column with what the first group of the last match must be (without a group, the whole
            match), blanks around both left out. None: any match will do.
        seconds: Most time for a response.
        name: For messages and metrics.
    """

    def __init__(
        self, pattern: str, key: str | None = None, *, seconds: float = 2.0, name: str = "regex"
    ) -> None:
        kinds = {"pattern": (Text, pattern), "key": (Text | None, key)}
        check_values("RegexScorer", {**kinds, "seconds": (Positive, seconds)})
        try:
            re.compile(pattern)
        except re.error as error:
            refuse("pattern", "be a regular expression", shown(pattern), str(error))
        self.pattern, self.key, self.seconds, self.name = pattern, key, seconds, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response.

        Raises:
            ScoringError: if there is no such column.
        """
        return score_rows(self, rollout)

    def score_one(self, response: str, value: Any) -> float:
        """Score a response, given the value of its row if there is a column."""
        if len(response) > MOST_READ:
            return 0.0
        found = ask("regex", [], self.seconds, text=response, pattern=self.pattern)
        is_right = self.key is None or (found and str(found[0]).strip() == str(value).strip())
        return float(bool(found and is_right))


class FormatScorer:
    """1 if a response consists of its parts, <think>…</think> <answer>…</answer>, else 0.

    Each part must be there once, in this order, and not be blank; between them only blanks.

    Args:
        tags: Names of the parts.
        name: For messages and metrics.
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer"), *, name: str = "format") -> None:
        check_values("FormatScorer", {"tags": (Texts, tags)})
        if not tags or len(set(tags)) < len(tags):
            refuse("tags", "be names that differ", shown(tags))
        self.tags, self.name = tuple(tags), name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response."""
        return Scored.of([float(self._fits(text)) for text in responses_of(rollout)], rollout)

    def _fits(self, text: str) -> bool:
        rest = text.strip()
        for tag in self.tags:
            start, end = f"<{tag}>", f"</{tag}>"
            inside, closed, after = rest.removeprefix(start).partition(end)
            once = text.count(start) == text.count(end) == 1
            if not (rest.startswith(start) and once and closed and inside.strip()):
                return False
            rest = after.lstrip()
        return not rest
