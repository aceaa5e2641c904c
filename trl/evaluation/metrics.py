"""What several samples of each prompt tell: pass@k, majority@k, and how sure a mean is.

pass_at_k(8, 2, 4)                                     # 8 samples, 2 of them right
majority_at_k(["42", "41", "42"], [1.0, 0.0, 1.0], 3)  # what most of three say
low, high = bootstrap(accuracy_of_each_prompt)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl.config.errors import refuse

__all__ = ["bootstrap", "checks_of", "majority_at_k", "pass_at_k"]

Floats = NDArray[np.float64]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that of k among n samples one is right at least (Chen et al., arXiv:2107.03374,
    eq. 1).

        pass@k = 1 − C(n−c, k) / C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i)

    The estimate of a prompt from all its samples, without bias: drawn without replacement. The
    product is taken in logarithms, so that no binomial overflows and small chances keep all digits.

    Args:
        samples: n.
        right: c, how many of them are right.
        k: At most n.
    """
    _check_k(k, samples)
    if not 0 <= right <= samples:
        refuse("right", f"be from 0 to the number of samples, {samples}", right)
    if right > samples - k:
        return 1.0
    return float(-np.expm1(np.log1p(-k / np.arange(samples - right + 1, samples + 1)).sum())) + 0.0


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """Expected score of the answer that most of k among n samples give (Wang et al.,
    arXiv:2203.11171, without weights).

        majority@k = Σ_D s(D) / C(n, k), over all draws D of k samples without replacement

    s(D) is the mean score of the samples with the most frequent answer of D; of answers that are
    equally frequent, the mean of theirs, as if a fair coin chose. Those without an answer have no
    vote; where nobody in D has one, s(D) = 0. Computed exactly, without a draw: the draws are
    counted by the number of votes that win, by polynomials in which x counts samples and y ties.

    Args:
        answers: n normalised texts; None or "": a sample without an answer.
        scores: n.
        k: At most n.
    """
    _check_k(k, n := len(answers))
    groups: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        groups.setdefault(answer or "", []).append(score)
    silent = len(groups.pop("", []))
    share = k / (n + 1)  # cancels out, and keeps the binomials from overflowing
    expected = 0.0
    sizes = [len(found) for found in groups.values()]
    for top in range(1, min(k, max(sizes, default=0)) + 1):  # votes of the answer that wins
        if silent + sum(min(size, top) for size in sizes) < k:
            continue  # there are not so many samples without one that has more
        ways = np.zeros([k + 1, k // top + 1])  # [samples drawn, answers that have `top` of them]
        ways[:, 0] = _binomial(silent, share, k)
        points = np.zeros_like(ways)  # the same times the scores of these answers
        for found in groups.values():
            chances, score = _binomial(len(found), share, k), sum(found) / len(found)
            more_ways, more_points = np.zeros_like(ways), np.zeros_like(points)
            for votes in range(min(top, len(found)) + 1):
                ties = int(votes == top)
                old = slice(k + 1 - votes), slice(ways.shape[1] - ties)
                new = slice(votes, None), slice(ties, None)
                more_ways[new] += chances[votes] * ways[old]
                more_points[new] += chances[votes] * (points[old] + ties * score * ways[old])
            ways, points = more_ways, more_points
        expected += (points[k, 1:] / np.arange(1, ways.shape[1])).sum()
    return float(expected / _binomial(n, share, k)[k])


def _binomial(size: int, share: float, k: int) -> Floats:
    """Return C(size, i) · share^i · (1 − share)^(size − i) for i = 0 … k; 0 beyond `size`."""
    logs = [
        math.lgamma(size + 1)
        - math.lgamma(i + 1)
        - math.lgamma(size - i + 1)
        + i * math.log(share)
        + (size - i) * math.log1p(-share)
        for i in range(min(size, k) + 1)
    ]
    return np.pad(np.exp(logs), (0, k + 1 - len(logs)))


def bootstrap(
    values: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Interval of a mean over prompts: the percentile bootstrap (Efron, Annals of Statistics 7,
    1979).

    The prompts are drawn anew, as many as there are, with replacement: so the interval tells how
    far another set of such prompts might be, with all samples of a prompt drawn together.

    Args:
        values: [P] one for each prompt, or [P, F] of F figures, drawn alike; NaN does not count.
        seed: Of the draws.
        resamples: How many draws.
        level: Share of them between the ends.

    Returns:
        Lower and upper end, [] or [F]; NaN for less than two values.
    """
    table = np.asarray(values, dtype=float)
    there, numbers = ~np.isnan(table), np.nan_to_num(table)
    draws, every = np.random.default_rng(seed), len(table)
    means = np.full([resamples, *table.shape[1:]], np.nan)
    for row in range(resamples if every else 0):
        drawn = draws.integers(every, size=every)
        count = there[drawn].sum(0)
        np.divide(numbers[drawn].sum(0), count, out=means[row, ...], where=count > 0)
    outside = (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of figures without a value
        low, high = np.nanquantile(means, [outside, 1 - outside], axis=0)
    enough = there.sum(0) > 1
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def checks_of(scorer: Any) -> list[str]:
    """Return the names of those parts of a reward that tell right from wrong.

    These are its scorers with a `key`, the column that they compare with: of kind math, code, json
    and regex. A response is right if each of them that has a say gives it 1.
    """
    parts = getattr(scorer, "parts", {})
    return [name for name, (part, _) in parts.items() if hasattr(part, "key")]


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        refuse("k", f"be from 1 to the number of samples, {samples}", k)
