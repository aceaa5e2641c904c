"""`Scored`: what a scorer found in a rollout, and the one place that judges whether scores fit one.

scored = scorer(rollout)
stats = trainer.step(rollout, scored)
scored.scores, scored.totals, scored.means()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trl.axes import pad_and_cat
from trl.batch import Rollout, odd_kind
from trl.config.errors import shown

MOST_SCORE = 1e15
"""Beyond, float32 makes infinity of the variance of a batch of token rewards, and 0 of what is
divided by it."""


class BadScores(ValueError):
    """Scores that do not fit their rollout.

    Args:
        rule: What they must be: "finite numbers".
        got: What they are.
        fix: What to do; nothing: left out.
        rows: Those of the rollout that are at fault; none: no single one is.
    """

    def __init__(self, rule: str, got: str, fix: str = "", rows: Sequence[int] = ()) -> None:
        self.problem = f"{rule}, got {got}{fix and ': '}{fix}"
        self.rows = tuple(rows)
        where = f", in row {rows[0]}" if rows else ""
        super().__init__(f"`scores` must be {rule}, got {got}{where}{fix and ': '}{fix}.")


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The scores of a rollout of B responses, and what else was found on the way to them."""

    scores: Tensor
    """[B] one for each response; or [B, R] one for each of its tokens, 0 where none counts.
    float32, on the CPU."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """[B] the scores of each part of a sum, by its name and without its weight; NaN where it has no
    say."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """[B] other figures of each response, by name; NaN where a figure does not count."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """B texts on the responses, by name: what was read off an answer."""
    counted: Tensor | None = None
    """[B] bool, False for a row on which nothing has a say: its scores are 0, and no step learns
    from it. None: all rows count."""

    @classmethod
    def of(cls, found: Any, rollout: Rollout) -> Scored:
        """Return what a scorer gave, checked.

        Args:
            found: A Scored; or one number for each response, in a list also None, which has no say;
                or, for each token, a tensor [B, R] or B sequences as long as the responses, or as
                their counted tokens.
            rollout: That was scored.

        Raises:
            BadScores: if they are not finite numbers, or not as many as that, or there is a score
                where no token counts.
        """
        given = found if isinstance(found, Scored) else cls(found)
        counted = _checked_rows(given.counted, rollout)
        if isinstance(given.scores, Tensor):
            scores = _checked(given.scores, rollout)
        else:
            entries = number_entries(given.scores, len(rollout), none=True)
            scores = _checked(_placed(entries, rollout), rollout)
            if None in entries:
                says = torch.tensor([entry is not None for entry in entries], device="cpu")
                counted = says if counted is None else says & counted
        if counted is not None:
            counts = counted if scores.ndim == 1 else counted[:, None]
            scores = scores.masked_fill(~counts, 0.0)
        if scores.ndim == 2 and (outside := (scores != 0) & ~rollout.response_mask.cpu()).any():
            rows = outside.any(1).nonzero().flatten().tolist()
            token = int(outside[rows[0]].nonzero()[0])
            raise BadScores(
                "rewards that are 0 where no token counts",
                f"{scores[rows[0], token].item()} at token {token} of row {rows[0]}",
                "use torch.where(rollout.response_mask, rewards, 0)",
                rows,
            )
        for name, column in (*given.parts.items(), *given.figures.items()):
            shape = list(column.shape) if isinstance(column, Tensor) else type(column).__name__
            if shape != [len(rollout)]:
                rule = f"parts and figures of the shape {[len(rollout)]}"
                raise BadScores(rule, f"{shape} for {name!r}")
        for name, texts in given.notes.items():
            if len(texts) != len(rollout):
                raise BadScores(f"notes of {len(rollout)} texts", f"{len(texts)} for {name!r}")
        return cls(scores, given.parts, given.figures, given.notes, counted)

    @classmethod
    def concat(cls, some: Sequence[Scored]) -> Scored:
        """Return the scores of several rollouts as those of `Rollout.concat`."""
        scores = [one.scores for one in some]
        wide = any(each.ndim == 2 for each in scores)
        # One score for each token, and for each response, are the same for those of one token.
        joined = pad_and_cat([each.reshape(len(each), -1) for each in scores])
        joined = joined if wide else joined[:, 0]
        sizes = [len(each) for each in scores]
        parts, figures = [one.parts for one in some], [one.figures for one in some]
        counted = None
        if any(one.counted is not None for one in some):
            counted = torch.cat([~one.totals.isnan() for one in some])
        none = {name: ("",) * max(sizes) for one in some for name in one.notes}
        pairs = list(zip((none | dict(one.notes) for one in some), sizes, strict=True))
        texts = {k: tuple(chain(*(notes[k][:size] for notes, size in pairs))) for k in none}
        return cls(joined, _joined(parts, sizes), _joined(figures, sizes), texts, counted)

    @property
    def totals(self) -> Tensor:
        """[B] the score of each response; NaN where it does not count."""
        found = totals(self.scores)
        return found if self.counted is None else found.masked_fill(~self.counted, math.nan)

    def means(self) -> dict[str, float]:
        """Return the mean of each part and figure over the rows where it counts, if it does."""
        parts = {name: scores[~scores.isnan()] for name, scores in self.parts.items()}
        counted = {k: figure for k, figure in self.figures.items() if not figure.isnan().all()}
        return {name: float(scores.mean()) for name, scores in parts.items() if len(scores)} | {
            name: figure.double().nanmean().item() for name, figure in counted.items()
        }


def totals(scores: Tensor) -> Tensor:
    """Return the score of each response [B], given that or the scores of its tokens [B, R]."""
    return scores if scores.ndim == 1 else scores.sum(1)


def _checked(found: Tensor, rollout: Rollout) -> Tensor:
    """Return finite scores of a rollout as float32 on the CPU: [B], or [B, R] of the tokens."""
    if kind := odd_kind(found):
        raise BadScores("a tensor with all its numbers", kind, "use scores.to_dense()")
    scores = found.detach()
    flat, wide = [len(rollout)], list(rollout.response_mask.shape)
    shape = list(scores.shape)
    if shape not in (flat, wide) or scores.is_complex():
        raise BadScores(
            f"real numbers of the shape {flat}, one for each response, or {wide}, one for each "
            "response token",
            f"{scores.dtype} {shape}",
            "use scores.squeeze(-1)" if shape == [*flat, 1] else "",
        )
    # A copy: one made in inference mode could not enter a graph, and the scorer may keep its own.
    scores = scores.to("cpu", torch.float32, copy=True)
    wrong = ~scores.isfinite().reshape(len(rollout), -1)
    if wrong.any():
        rows = wrong.any(1).nonzero().flatten().tolist()
        first = scores.reshape(len(rollout), -1)[wrong][0].item()
        got = f"{first} for {len(rows)} of {len(rollout)} responses"
        raise BadScores("finite numbers", got, rows=rows)
    if (most := scores.abs().max().item()) > MOST_SCORE:
        raise BadScores(f"numbers up to {MOST_SCORE:g}, whose squares are finite", f"{most:.3g}")
    return scores


def _checked_rows(counted: Tensor | None, rollout: Rollout) -> Tensor | None:
    """Return which rows count, [B] on the CPU; None: all do."""
    if counted is None:
        return None
    shape = list(getattr(counted, "shape", ()))
    if shape != [len(rollout)] or counted.dtype != torch.bool:
        got = f"{getattr(counted, 'dtype', type(counted).__name__)} {shape}"
        raise BadScores(f"`counted` as bool of the shape {[len(rollout)]}", got)
    return None if counted.all() else counted.cpu()


def number_entries(found: Any, rows: int, *, none: bool = False) -> list[Any]:
    """Take apart what was found for so many rows: one number, or one list of them, for each.

    Args:
        found: A list, tensor, array or other iterable.
        rows: Of the rollout that `found` is about.
        none: Whether None may stand in place of a number.

    Raises:
        BadScores: if it is something else.
    """
    found = _plain(found)
    rule = f"one number for each of the {rows} responses"
    if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
        got = f"the number {found}" if isinstance(found, Real) else shown(found)
        fix = "a reward is called once for all responses, and returns a list of numbers"
        raise BadScores(rule, f"{got}, not a list", fix)
    entries = [_plain(entry) for entry in found]
    if len(entries) != rows:
        raise BadScores(rule, f"a list of {len(entries)}")
    said = [[] if none and entry is None else entry for entry in entries]
    lists = [entry if isinstance(entry, list) else [entry] for entry in said]
    if wrong := [row for row, entry in enumerate(lists) if not all(map(_is_number, entry))]:
        fix = "return numbers, as of float(...)" if isinstance(entries[wrong[0]], str) else ""
        raise BadScores(rule, shown(entries[wrong[0]]), fix, wrong)
    return entries


def _is_number(value: Any) -> bool:
    """Tell whether it is a real number that a float can hold; one that is not finite is, too."""
    if not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _placed(entries: Sequence[float | list[float] | None], rollout: Rollout) -> Tensor:
    """Return a tensor [B] of the numbers, or [B, R] of lists of them for the responses' tokens.

    None gives 0.
    """
    lists = {row: entry for row, entry in enumerate(entries) if isinstance(entry, list)}
    if all(len(entry) == 1 for entry in lists.values()):
        numbers = [entry[0] if isinstance(entry, list) else entry or 0.0 for entry in entries]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").float()
    rule = "one number for each response, or one for each token of each response"
    if len(lists) < sum(entry is not None for entry in entries):
        got = f"both: lists for {len(lists)} of {len(entries)} responses"
        raise BadScores(rule, got, rows=list(lists))
    mask = rollout.response_mask.cpu()
    placed = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
    for row, entry in lists.items():
        counted = mask[row].nonzero().flatten()
        length = int(counted[-1]) + 1
        if len(entry) not in (length, len(counted)):
            got = f"a list of {len(entry)} for row {row}, which has {len(counted)} tokens"
            raise BadScores(rule, got, rows=[row])
        places = counted if len(entry) == len(counted) else slice(length)
        placed[row, places] = torch.tensor(entry, dtype=torch.float64, device="cpu").float()
    return placed.masked_fill(~mask, 0.0)


def _joined(columns: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return the columns [b] of all parts below each other, NaN where a part has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    none = torch.full((max(sizes),), math.nan, dtype=torch.float32, device="cpu")
    pairs = list(zip(columns, sizes, strict=True))
    return {name: torch.cat([c.get(name, none[:size]) for c, size in pairs]) for name in names}


def _plain(found: Any) -> Any:
    """Turn tensors and arrays, also those inside lists, into Python numbers and lists."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    return [_plain(entry) for entry in found] if isinstance(found, (list, tuple)) else found
