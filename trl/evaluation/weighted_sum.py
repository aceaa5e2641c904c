"""Several scorers as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trl.batch import Rollout
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer, name_of, score

__all__ = ["WeightedSum"]

Part = Scorer | Callable[[list[str]], Any]


class WeightedSum:
    """Σ_i w_i · s_i over scorers i.

        scorer = WeightedSum([(ClassifierScorer(...), 1.0), (too_long, -0.1)])

    If one of the parts gives rewards for each token, the scores of the others are added at the last
    counted token of each response.

    Args:
        parts: (scorer, weight) pairs, or a dict {scorer: weight}. A scorer may be a function of
            texts.

    Attributes:
        scores: [B] of each part in the last rollout, by its name and without its weight; for
            rewards per token, their sums over the responses. Parts of the same name are numbered.
        means: of these; and the `means` that a part keeps of its own.
        rows: the figures [B] that parts keep of their own, by name, as `ControlScorer` does.
    """

    def __init__(self, parts: Mapping[Part, float] | Sequence[tuple[Part, float]]) -> None:
        pairs = _pairs(parts)
        if not pairs:
            raise ValueError("`parts` must have at least one scorer, got none.")
        self.parts: dict[str, tuple[Scorer, float]] = {}
        for part, weight in pairs:
            scorer = as_scorer(part)
            name = unnumbered = name_of(scorer)
            count = 1
            while name in self.parts:
                count += 1
                name = f"{unnumbered} {count}"
            if (
                isinstance(weight, bool)
                or not isinstance(weight, Real)
                or not math.isfinite(weight)
            ):
                raise ValueError(f"the weight of {name} must be a finite number, got {weight!r}.")
            self.parts[name] = scorer, float(weight)
        self.scores: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score each response by all parts.

        Returns:
            scores [B], or rewards [B, R] if a part gives rewards; float32, CPU.
        Raises:
            ScoringError: if a part fails; it is named.
        """
        found = {name: score(scorer, rollout) for name, (scorer, _) in self.parts.items()}
        per_token = any(scores.ndim == 2 for scores in found.values())
        total = torch.zeros(rollout.response_mask.shape if per_token else len(rollout))
        for name, (_, weight) in self.parts.items():
            scores = found[name]
            if per_token and scores.ndim == 1:
                scores = at_last_token(scores, rollout.response_mask.cpu())
            total += weight * scores
        self.scores = {
            name: scores.sum(1) if scores.ndim == 2 else scores for name, scores in found.items()
        }
        self.means = {name: float(scores.mean()) for name, scores in self.scores.items()}
        self.rows = {}
        for scorer, _ in self.parts.values():
            self.means |= means_of(scorer)
            rows = getattr(scorer, "rows", None)
            self.rows |= rows if isinstance(rows, dict) else {}
        return total


def _pairs(parts: Any) -> list[tuple[Any, Any]]:
    """Return the parts as (scorer, weight) pairs.

    Raises:
        TypeError: if they are something else.
    """
    entries = list(parts.items() if isinstance(parts, Mapping) else _listed(parts))
    for index, entry in enumerate(entries):
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise TypeError(
                f"`parts` must be (scorer, weight) pairs, but parts[{index}] is {entry!r}: "
                "WeightedSum([(scorer, 1.0), (another, -0.1)])."
            )
    return entries


def _listed(parts: Any) -> list[Any]:
    if isinstance(parts, str | bytes) or not isinstance(parts, Iterable):
        raise TypeError(
            f"`parts` must be a list of (scorer, weight) pairs or a dict, got {parts!r}: "
            "WeightedSum([(scorer, 1.0), (another, -0.1)])."
        )
    return list(parts)


def means_of(scorer: Any) -> dict[str, float]:
    """Return the means by name that a scorer keeps of its last rollout, if it is of that kind."""
    means = getattr(scorer, "means", None)
    return means if isinstance(means, dict) else {}


def at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Place each score [B] at the last counted token of its row: [B, R], 0 elsewhere."""
    last = (mask.long() * torch.arange(mask.shape[1])).argmax(1, keepdim=True)
    return torch.zeros(mask.shape).scatter(1, last, scores.unsqueeze(1))
