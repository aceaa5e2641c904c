"""Scores inside a response: where its steps end, and on which tokens what is said of them lands."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from trl.batch import Rollout
from trl.evaluation.scores import PARAGRAPH, ScoringError, has_tokens, pairs_of
from trl.scored import BadScores, Scored, number_entries

SEPARATOR = "\n\n"
"""What ends a step, unless something else is said."""

# So many tokens of the query are read before a response: a character has at most four bytes, and
# the first word of a text may lose the space before it.
CONTEXT = 8

HALF = "\ufffd"


class Step(NamedTuple):
    """A step of a response."""

    text: str
    """Without what ends it."""
    end: int
    """Characters of the response up to its end, with what ends it."""


def steps_of(response: str, separator: str, *, cut: bool = False) -> list[Step]:
    """Cut a response into its steps, at least one.

    What is blank is no step: it belongs to the step before it, or else to the first one.

    Args:
        response: Text.
        separator: What ends a step.
        cut: Whether it ended at the limit of its length, where a separator may be half there: that
            half is left out of the last step's text.
    """
    sizes = range(len(separator) - 1, 0, -1)
    half = next((size for size in sizes if cut and response.endswith(separator[:size])), 0)
    steps, end = list[Step](), 0
    for piece in response[: len(response) - half].split(separator):
        end = min(end + len(piece) + len(separator), len(response))
        if piece.strip():
            steps.append(Step(piece, end))
        elif steps:
            steps[-1] = steps[-1]._replace(end=end)
    return steps or [Step(response, len(response))]


def steps_of_rows(rollout: Rollout, separator: str) -> list[list[Step]]:
    """Return the steps of each response."""
    rows = range(len(rollout))
    cut = [False for _ in rows] if rollout.ended is None else (~rollout.ended).tolist()
    responses = [response for _, response in pairs_of(rollout)]
    return [steps_of(responses[row], separator, cut=cut[row]) for row in rows]


def of_steps(found: Any, rollout: Rollout, steps: Sequence[Sequence[Step]]) -> Scored:
    """Place the numbers of the steps of each response on its tokens.

        r_t = Σ_i s_i · 1[t is the token that completes step i]

    What ends a step belongs to it. The last step has all that follows, so that its number is on the
    last counted token (the EOS, or the one that was cut off at), as is the score of a whole
    response; the numbers of steps that end in one token are added up.

    Args:
        found: For each response a list with a number for each of its steps; or a number, for the
            whole; or None, which has no say.
        rollout: Of B responses.
        steps: Of each.
    Returns:
        Scores [B, R], or [B] if each response has one number for the whole, or no tokens; and how
        many steps it has, as the figure `steps`.
    Raises:
        BadScores: for another number of them.
        ScoringError: if a response has steps, and the rollout nothing to `decode` them with.
    """
    entries = number_entries(found, len(rollout), none=True)
    figures = {"steps": torch.tensor([len(each) for each in steps], device="cpu").float()}
    if not any(isinstance(entry, list) for entry in entries):
        return Scored(entries, figures=figures)  # type: ignore[arg-type]  # `of` takes them
    for row, (entry, own) in enumerate(zip(entries, steps, strict=True)):
        if isinstance(entry, list) and len(entry) != len(own):
            rule = "one number for each step of each response"
            raise BadScores(rule, f"{len(entry)} for the {len(own)} steps of row {row}", rows=[row])
    mask = rollout.response_mask.cpu()
    placed = torch.zeros(mask.shape, dtype=torch.float64, device="cpu")
    for row, (entry, own) in enumerate(zip(entries, steps, strict=True)):
        numbers = entry if isinstance(entry, list) else [entry or 0.0]
        places = mask[row].nonzero().flatten()
        tokens = tokens_of(rollout, row, own[-len(numbers) :])
        for token, number in zip(tokens, numbers, strict=True):
            placed[row, places[token]] += float(number)
    counted = torch.tensor([entry is not None for entry in entries], device="cpu")
    scores = placed.float() if has_tokens(rollout) else placed.float().sum(1)
    return Scored(scores, figures=figures, counted=counted)


def tokens_of(rollout: Rollout, row: int, steps: Sequence[Step]) -> list[int]:
    """Return which of its counted tokens completes each of a response's steps, the first one: 0."""
    last = int(rollout.response_mask[row].sum()) - 1
    if last == 0 or len(steps) == 1:  # there is nothing to choose, nor to decode
        return [last] * len(steps)
    read = characters(rollout, row)
    ends = [bisect_left(range(last), step.end, key=lambda t: read(t + 1)) for step in steps[:-1]]
    return [*ends, last]


def characters(rollout: Rollout, row: int) -> Callable[[int], int]:
    """Return what tells how much of a response's text its first n counted tokens hold.

    A character that they hold in part does not count. What the policy wrote in several turns is a
    text for each, a blank line between two.
    """
    if rollout.decode is None:
        raise ScoringError(
            "the rollout must have `decode` for scores inside of a response, got None: sample with "
            "Sampler(tokenizer), or use dataclasses.replace(rollout, decode=Sampler(tokenizer)"
            ".text_of)."
        )
    decode, mask = rollout.decode, rollout.response_mask[row].cpu()
    (text,) = (rollout.response_texts or ())[row : row + 1]
    several = rollout.episodes is not None
    apart = several or rollout.texts_apart
    query = [] if apart else rollout.queries[row][rollout.query_mask[row]][-CONTEXT:].tolist()
    places = mask.nonzero().flatten().tolist()
    tokens = rollout.responses[row].cpu()[mask].tolist()
    # Where a turn begins: behind a hole.
    begins = [n for n in range(1, len(places)) if several and places[n] > places[n - 1] + 1]
    turns = list(zip([0, *begins], [*begins, len(tokens)], strict=True))

    @cache
    def said(first: int, end: int) -> str:
        return decode(query, tokens[first:end]).rstrip(HALF)

    def read(count: int) -> int:
        at = 0
        for first, end in turns:
            if first >= count:
                break
            own = said(first, min(end, count))
            alike = (one == other for one, other in zip(own, text[at:], strict=False))
            at += len(list(takewhile(bool, alike)))
            at += len(PARAGRAPH) if end <= count and end < len(tokens) else 0
        return at

    return read
