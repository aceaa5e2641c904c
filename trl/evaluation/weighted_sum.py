"""Several scorers as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse
from trl.evaluation.function import FunctionScorer, as_scorer
from trl.evaluation.row_by_row import without_column
from trl.evaluation.scores import Scorer, by_hand, name_of, score_all
from trl.scored import Scored

__all__ = ["WeightedSum"]

Part = Scorer | Callable[[list[str]], Any]
Columns = Callable[[], Iterable[Collection[str]]]
"""Called, returns the names of the columns of the rows of each source of prompts."""


class WeightedSum:
    """Σ_i w_i · s_i over the scorers i that have a say on a row.

        scorer = WeightedSum([(ClassifierScorer(...), 1.0), (too_long, -0.1)])

    If one of the parts gives rewards for each token, the scores of the others are added at the last
    counted token of each response. A row on which no part with a weight has a say does not count.

    Args:
        parts: (scorer, weight) pairs, scorers of weight 1, or a dict {scorer: weight}. A scorer may
            be a function. Parts of the same name are numbered.
    """

    def __init__(self, parts: Mapping[Part, float] | Sequence[Part | tuple[Part, float]]) -> None:
        pairs = _pairs(parts)
        if not pairs:
            refuse("parts", "have at least one scorer", "none")
        self.parts: dict[str, tuple[Scorer, float]] = {}
        for part, weight in pairs:
            scorer = as_scorer(part)
            name = unnumbered = name_of(scorer)
            count = 1
            while name in self.parts:
                count += 1
                name = f"{unnumbered} {count}"
            check_values("WeightedSum", {f"weight of {name}": (float, weight)})
            self.parts[name] = scorer, float(weight)

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response by all parts.

        Returns:
            The sums; the scores of each part (for rewards per token, their sums over the
            responses), and the parts and figures that it has itself.
        Raises:
            ScoringError: if a part fails; it is named.
        """
        found = score_all({name: scorer for name, (scorer, _) in self.parts.items()}, rollout)
        per_token = any(scored.scores.ndim == 2 for scored in found.values())
        # From what is there: neither a default device nor a default dtype is for scores.
        total = torch.zeros_like(max((s.scores for s in found.values()), key=Tensor.dim))
        parts = {name: scored.totals for name, scored in found.items()}
        figures, notes = dict[str, Tensor](), dict[str, Any]()
        for name, scored in found.items():
            scores = scored.scores
            if per_token and scores.ndim == 1:
                scores = at_last_token(scores, rollout.response_mask.cpu())
            total += self.parts[name][1] * scores
            parts |= scored.parts
            figures |= scored.figures
            notes |= scored.notes
        says = [found[name].counted for name, (_, weight) in self.parts.items() if weight]
        partial = [each for each in says if each is not None]
        none_has_all = partial and len(partial) == len(says)
        counted = torch.stack(partial).any(0) if none_has_all else None
        return Scored(total, parts, figures, notes, counted)

    def missing(self, columns: Collection[str]) -> str:
        """Return what parts ask for that rows with these columns lack; nothing: nothing."""
        found = []
        for part, _ in self.parts.values():
            if isinstance(part, FunctionScorer | WeightedSum):
                found.append(part.missing(columns))
            elif hasattr(part, "score_one") and getattr(part, "key", None) is not None:
                found.append(without_column(part.key, part.name, columns))
        return " ".join(filter(None, found))


def check_columns(scorer: Scorer, columns: Columns) -> None:
    """Raise a ValueError if a scorer asks for a column that some rows lack.

    Args:
        scorer: Alone, or a sum of several.
        columns: Called if one asks for any.
    """
    whole = WeightedSum([scorer])
    for names in columns() if whole.missing(()) else ():
        if problem := whole.missing(names):
            raise ValueError(problem)


def _pairs(parts: Any) -> list[tuple[Any, Any]]:
    """Return the parts as (scorer, weight) pairs, after checking that they are such."""
    try:
        if isinstance(parts, str):
            raise TypeError
        entries = parts.items() if isinstance(parts, Mapping) else list(parts)
        pairs = [each if isinstance(each, tuple | list) else (each, 1.0) for each in entries]
        return [(scorer, weight) for scorer, weight in pairs]
    except (TypeError, ValueError):
        fix = "WeightedSum([(scorer, 1.0), (another, -0.1)])"
        refuse("parts", "be (scorer, weight) pairs", repr(parts), fix, error=TypeError)


def at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Place each score [B] at the last counted token of its row: [B, R], 0 elsewhere."""
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # the first of the largest
    return torch.zeros_like(mask, dtype=scores.dtype).scatter(1, last, scores.unsqueeze(1))
