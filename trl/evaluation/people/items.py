"""What people judge, and what they may answer.

An answer is the index of a response (pair, best), a rating from 1 to 5 (rating), whether it is good
(thumbs: True or False), or one of the words `tie`, `both_bad` and `skip`. Indices always count the
responses as the item has them, never as they were shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.config.errors import refuse, shown

__all__ = ["BOTH_BAD", "QUESTIONS", "SKIP", "TIE", "Answer", "Item", "Prompt", "Question", "Vote"]

Answer = int | bool | str
Prompt = str | Sequence[Mapping[str, str]]
"""A text, or messages with role and content."""

TIE, BOTH_BAD, SKIP = "tie", "both_bad", "skip"

LONGEST = 2_000_000
"""Characters of a text that a page still shows."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of an item."""

    fewest: int
    """Responses of an item."""
    most: int
    others: tuple[Answer, ...]
    """What may be answered besides the index of a response, where there are several, and `skip`."""

    def check(self, answer: Answer, responses: int) -> None:
        """Raise a ValueError if that is no answer to an item of so many responses."""
        known: list[Answer] = [*(range(responses) if responses > 1 else ()), *self.others, SKIP]
        # 1 == True, and each answers another question
        if not any(type(answer) is type(each) and answer == each for each in known):
            refuse("answer", f"be one of {known}", shown(answer))


QUESTIONS = {
    "pair": Question(2, 2, (TIE, BOTH_BAD)),
    "rating": Question(1, 1, (1, 2, 3, 4, 5)),
    "thumbs": Question(1, 1, (True, False)),
    "best": Question(2, 4, (BOTH_BAD,)),
}


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person answered."""

    annotator: str
    answer: Answer
    seconds: float | None = None
    """How long it took."""
    when: float | None = None
    """Seconds since 1970."""
    shown: tuple[int, ...] = ()
    """The responses in the order in which they were shown, as indices."""
    flag: bool = False
    comment: str = ""

    def row(self) -> dict[str, Any]:
        """Return it as plain values, without what is empty."""
        row = {"annotator": self.annotator, "answer": self.answer}
        more = {
            "seconds": self.seconds,
            "when": self.when,
            "shown": list(self.shown) or None,
            "flag": self.flag or None,
            "comment": self.comment or None,
        }
        return row | {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and 1 to 4 responses to it.

    Raises:
        TypeError, ValueError: if it cannot be shown, naming what is wrong.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    sources: tuple[str, ...] = ()
    """Who wrote each: a model, a run. Not shown to who judges."""
    ratings: tuple[float, ...] = ()
    """How good each is by what the item came with."""
    gold: Answer | None = None
    """The right answer, where it is known."""
    votes: tuple[Vote, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            _check_text("prompt", self.prompt)
        else:
            for message in self.prompt:
                if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                    refuse("prompt", "be a text, or messages with role and content", shown(message))
                _check_text("prompt", message.get("content"))
                _check_text("role", message["role"])
        if not 1 <= len(self.responses) <= 4:
            refuse("responses", "be 1 to 4", str(len(self.responses)))
        for response in self.responses:
            _check_text("responses", response)
        for name in ("sources", "ratings"):
            if len(getattr(self, name)) not in (0, len(self.responses)):
                rule = f"be one for each of the {len(self.responses)} responses"
                refuse(name, rule, shown(list(getattr(self, name))))
        for source in self.sources:
            _check_text("sources", source)

    @property
    def key(self) -> str:
        """The same for the same prompt and responses."""
        said = json.dumps([self.prompt, list(self.responses)], sort_keys=True, default=dict)
        return hashlib.sha256(said.encode()).hexdigest()[:32]


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        refuse(name, "be a text", shown(text), error=TypeError)
    if len(text) > LONGEST:
        refuse(name, f"have at most {LONGEST:,} characters", f"{len(text):,}", "cut it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(name, "be valid Unicode", f"{shown(text)} ({error.reason})")
