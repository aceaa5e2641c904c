"""Score texts by whether they are what a control prefix of the query asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse, shown
from trl.config.types import Count, Positive, RangeOfEach, WeightOfEach
from trl.evaluation.classifier import ClassifierScorer
from trl.evaluation.scores import by_hand, pairs_of
from trl.scored import Scored

__all__ = ["ControlScorer", "range_reward"]


def range_reward(
    log_odds: Tensor, low: Tensor, high: Tensor, *, best: float, worst: float
) -> Tensor:
    """How far inside a range of probabilities each log-odds lies: a tent, cut at both ends.

        d_i = min(x_i − logit(low_i), logit(high_i) − x_i)      r_i = clamp(d_i, worst, best)

    d is the distance to the nearest end of the range in nats of log-odds: > 0 inside, 0 at an end,
    < 0 outside. An end at probability 0 or 1 is infinitely far away.

    Args:
        log_odds: [B] x = log p / (1 − p).
        low: [B] lower ends, as probabilities.
        high: [B] upper ends.
        best: No reward is higher: texts gain nothing by being surer than that.
        worst: No reward is lower: texts that are all wrong are alike.
    Returns:
        [B].
    """
    # In float64: an end like 0.999999 keeps its place.
    x, a, b = log_odds.double(), low.double().logit(), high.double().logit()
    return torch.minimum(x - a, b - x).clamp(worst, best).float()


class ControlScorer:
    """Rewards texts whose probability of a label is in the range that the query's prefix asks for.

        classifier = ClassifierScorer("path/to/classifier", label="POSITIVE")
        scorer = ControlScorer(
            classifier,
            {"[negative] ": (0.0, 0.25), "[neutral] ": (0.35, 0.65), "[positive] ": (0.75, 1.0)},
        )
        scores = scorer(rollout)  # [B]; each query begins with one of the three

    The classifier reads query and response as one text, without the prefix. With its log-odds x of
    the label, and (low, high) the range of the row's prefix, the score is

        w · scale · clamp(min(x − logit(low), logit(high) − x), worst, best)

    with the weight w of the prefix, and w · scale · worst for a response of fewer than `min_tokens`
    tokens: a policy that stops at once would leave a neutral query neutral, and have written
    nothing.

    Args:
        classifier: Gives the log-odds, whatever its own `output` is.
        targets: {prefix: (low, high)}, 0 <= low < high <= 1. Of two prefixes that fit a query the
            longer counts.
        weights: {prefix: w}, > 0; 1 for those that are not named. More for a target that is harder
            to hit, so that more of the KL is spent on it.
        scale: Reward for a nat of log-odds, > 0.
        best: Highest reward before scaling, > 0. The default is that of p = 0.5 in the range
            0.35 … 0.65, logit(0.65) = 0.62: no other range then has more to give.
        worst: Lowest reward before scaling, < 0.
        min_tokens: Shortest response that can hit its target.
        name: What messages and metrics call the scorer.

    Raises:
        ValueError, TypeError: if a setting cannot work.
    """

    def __init__(
        self,
        classifier: ClassifierScorer,
        targets: Mapping[str, tuple[float, float]],
        *,
        weights: Mapping[str, float] | None = None,
        scale: float = 1.0,
        best: float = 0.62,
        worst: float = -1.0,
        min_tokens: int = 1,
        name: str = "control",
    ) -> None:
        if not isinstance(classifier, ClassifierScorer):
            got = type(classifier).__name__
            refuse("classifier", "be a ClassifierScorer", got, error=TypeError)
        self.classifier = copy.copy(classifier)
        self.classifier.set_output("log_odds")
        checks = {
            "scale": (Positive, scale),
            "best": (Positive, best),
            "worst": (Annotated[float, Field(lt=0)], worst),
            "min_tokens": (Count, min_tokens),
            "weights": (WeightOfEach, weights or {}),
        }
        check_values("ControlScorer", checks)
        self.targets = _checked(targets)
        if unknown := [prefix for prefix in weights or {} if prefix not in self.targets]:
            refuse("weights", f"name prefixes of {list(self.targets)}", repr(unknown[0]))
        self.weights = dict.fromkeys(self.targets, 1.0) | dict(weights or {})
        self.scale, self.best, self.worst = scale, best, worst
        self.min_tokens = min_tokens
        self.name = name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response by the target that its query names.

        Returns:
            The scores, and as figures whether a response hit its target (1; the text is inside the
            range, the ends do not count) or not (0): "hit" of all, "hit/[neutral]" of one prefix,
            without the space around it, NaN for those of another one.
        Raises:
            ValueError: if a query begins with none of the prefixes.
            ScoringError: if the rollout has no texts, or the classifier fails.
        """
        queries = [query for query, _ in pairs_of(rollout)]
        prefixes = [self._prefix_of(query) for query in queries]
        plain = tuple(map(str.removeprefix, queries, prefixes))
        log_odds = self.classifier(replace(rollout, query_texts=plain, query_messages=None)).scores
        exact = {"dtype": torch.float64, "device": "cpu"}
        low, high = torch.tensor([self.targets[prefix] for prefix in prefixes], **exact).T
        rewards = range_reward(log_odds, low, high, best=self.best, worst=self.worst)
        long_enough = rollout.response_mask.sum(1).cpu() >= self.min_tokens
        rewards = torch.where(long_enough, rewards, self.worst)
        weights = torch.tensor([self.weights[prefix] for prefix in prefixes], **exact).float()
        hits = _hits(prefixes, rewards > 0, list(self.targets))
        return Scored(self.scale * rewards * weights, figures=hits)

    def _prefix_of(self, query: str) -> str:
        """Return the longest of the prefixes that the query begins with."""
        found = [prefix for prefix in self.targets if query.startswith(prefix)]
        if not found:
            known = ", ".join(map(repr, self.targets))
            raise ValueError(
                f"each query must begin with one of the prefixes {known}, got {shown(query)}: "
                "put one before the prompt, or add it to `targets`."
            )
        return max(found, key=len)


def _hits(prefixes: list[str], hits: Tensor, known: list[str]) -> dict[str, Tensor]:
    """Return the hits [B] of all rows, and of those of each prefix, NaN for the others."""
    hits = hits.float()
    rows = {"hit": hits}
    for prefix in known:
        own = torch.tensor([other == prefix for other in prefixes], device="cpu")
        rows[f"hit/{prefix.strip()}"] = torch.where(own, hits, math.nan)
    return rows


def _checked(targets: Any) -> dict[str, tuple[float, float]]:
    """Return the targets as a dict of their own, or raise."""
    check_values("ControlScorer", {"targets": (RangeOfEach, targets)})
    if not targets:
        refuse("targets", "have at least one prefix", "none", '{"[positive] ": (0.75, 1.0)}')
    for prefix, (low, high) in targets.items():
        if low == high:
            refuse(f"targets[{prefix!r}]", "be a pair with low < high", repr((low, high)))
    return {prefix: (float(low), float(high)) for prefix, (low, high) in targets.items()}
