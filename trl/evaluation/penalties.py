"""Penalties on how a response is written: for its length, and for saying the same again."""

from __future__ import annotations

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Count
from trl.evaluation.checks import responses_of
from trl.evaluation.scores import by_hand, has_tokens
from trl.scored import Scored

__all__ = ["LengthPenalty", "RepetitionPenalty"]


class LengthPenalty:
    """The soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).

        0                                |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache      below L_max
        −1                               |y| > L_max

    |y| is the number of the counted tokens of the response.

    Args:
        max_tokens: L_max.
        soft_tokens: L_cache: over so many tokens it goes from 0 to −1.
        name: For messages and metrics.
    """

    def __init__(self, max_tokens: int, soft_tokens: int, *, name: str = "length") -> None:
        checks = {"max_tokens": (Count, max_tokens), "soft_tokens": (Count, soft_tokens)}
        check_values("LengthPenalty", checks)
        if soft_tokens > max_tokens:
            refuse("soft_tokens", f"be <= max_tokens ({max_tokens})", soft_tokens, "lower it")
        self.max_tokens, self.soft_tokens, self.name = max_tokens, soft_tokens, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response: from −1 to 0. Of texts without tokens, it has no say."""
        if not has_tokens(rollout):
            return Scored.of([None] * len(rollout), rollout)
        over = rollout.response_mask.sum(1) - (self.max_tokens - self.soft_tokens)
        return Scored.of(-(over / self.soft_tokens).clamp(0, 1), rollout)


class RepetitionPenalty:
    """Minus the share of n-grams of words that were there before (arXiv:2502.03373, appendix C.2).

        −(1 − distinct n-grams / all n-grams)

    0 for fewer than n + 1 words. Words are what stands between blanks, capital or not.

    Args:
        ngram: n.
        name: For messages and metrics.
    """

    def __init__(self, ngram: int = 3, *, name: str = "repetition") -> None:
        check_values("RepetitionPenalty", {"ngram": (Count, ngram)})
        self.ngram, self.name = ngram, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response: from −1 to 0."""
        return Scored.of([-self._again(text) for text in responses_of(rollout)], rollout)

    def _again(self, text: str) -> float:
        words = text.casefold().split()
        ngrams = list(zip(*(words[start:] for start in range(self.ngram)), strict=False))
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
