"""Do people agree: with each other, and with answers that are known. Which source do they prefer?

Skips count in none of it. Intervals are of 95 % (Wilson); votes on one item are not independent, so
that an item counts once, however many judged it.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from trl.evaluation.people.items import SKIP, Answer, Item

__all__ = ["agreement", "cohen_kappa", "fleiss_kappa", "interval", "write_agreement"]

Figures = dict[str, Any]


def agreement(question: str, items: Iterable[Item]) -> Figures:
    """Return how far people agree, as plain values.

    Args:
        question: What was asked.
        items: With their votes.
    """
    items = list(items)
    told = [{v.annotator: v.answer for v in item.votes if v.answer != SKIP} for item in items]
    plain = [answers for item, answers in zip(items, told, strict=True) if item.gold is None]
    names = sorted({vote.annotator for item in items for vote in item.votes})
    pairs = []
    for a, b in combinations(names, 2):
        both = [(each[a], each[b]) for each in told if a in each and b in each]
        if both:
            pairs.append({"annotators": [a, b], "items": len(both), "kappa": cohen_kappa(both)})
    level = "ordinal" if question == "rating" else "nominal"
    return {
        "question": question,
        "items": len(items),
        "judged": sum(map(bool, told)),
        "votes": sum(map(len, told)),
        "judged_by_several": sum(len(each) > 1 for each in plain),
        "cohen_kappa": pairs,
        "fleiss_kappa": fleiss_kappa([list(each.values()) for each in told]),
        "krippendorff_alpha": _alpha(told, names, level),
        "level": level,
        "annotators": {name: _of_annotator(name, items) for name in names},
        "shown_first": _shown_first(items),
        "sources": _sources(question, items),
    }


def cohen_kappa(pairs: Sequence[tuple[Answer, Answer]]) -> float | None:
    """Cohen's κ of the answers of two people to the same items (Cohen, 1960).

        κ = (p_o − p_e) / (1 − p_e)     p_e = Σ_k p_k(first)·p_k(second)

    None where both always gave one and the same answer: nothing is left to agree on.
    """
    count = len(pairs)
    first, second = (Counter(map(_key, side)) for side in zip(*pairs, strict=True))
    observed = sum(_key(a) == _key(b) for a, b in pairs) / count
    expected = sum(first[key] * second[key] for key in first) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(told: Sequence[Sequence[Answer]]) -> float | None:
    """Fleiss' κ of the answers to each item, by any people (Fleiss, 1971).

        P_i = (Σ_k n_ik² − n_i) / (n_i·(n_i − 1))     P_e = Σ_k p_k²
        κ = (mean P_i − P_e) / (1 − P_e)

    Items may have different numbers of answers, which Fleiss does not have; those with one do not
    count. None where there is none with two, or only one answer was ever given.
    """
    counts = [Counter(map(_key, answers)) for answers in told if len(answers) > 1]
    if not counts:
        return None
    sizes = [sum(each.values()) for each in counts]
    agree = [
        (sum(n * n for n in each.values()) - size) / (size * (size - 1))
        for each, size in zip(counts, sizes, strict=True)
    ]
    shares = [n / sum(sizes) for n in sum(counts, Counter()).values()]
    expected = sum(share * share for share in shares)
    return None if len(shares) == 1 else (mean(agree) - expected) / (1 - expected)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a share (Wilson, 1927).

        (p + z²/2n ± z·√(p·(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Successes may be fractions: then it is wider than it had to be.
    """
    if not count:
        return 0.0, 1.0
    z, p, n = 1.959964, successes / count, count
    half = z * math.sqrt(max(p * (1 - p) / n, 0) + z * z / (4 * n * n))
    middle, whole = p + z * z / (2 * n), 1 + z * z / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def interval(successes: float, count: int) -> Figures:
    """Return the share of successes with its interval."""
    if not count:
        return {"share": None, "low": None, "high": None, "of": 0}
    low, high = wilson(successes, count)
    return {"share": successes / count, "low": low, "high": high, "of": count}


def write_agreement(figures: Figures, path: str | Path) -> None:
    """Write figures as JSON, or as a page where the name ends in .html."""
    path = Path(path).expanduser()
    if path.suffix == ".html":
        from jinja2 import Environment

        source = resources.files(__package__).joinpath("page", "agreement.html.jinja")
        made = Environment(autoescape=True, trim_blocks=True).from_string(source.read_text("utf-8"))
        path.write_text(made.render(figures), encoding="utf-8")
    else:
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(answer: Answer) -> str:
    """True and 1 are two answers."""
    return json.dumps(answer)


def _alpha(told: Sequence[dict[str, Answer]], names: Sequence[str], level: Any) -> float | None:
    """Krippendorff's α of all answers; None where there is nothing to compare."""
    import krippendorff
    import numpy as np

    keys = sorted({_key(answer) for each in told for answer in each.values()})
    if len(keys) < 2 or not any(len(each) > 1 for each in told):
        return None
    data = [
        [keys.index(_key(each[name])) if name in each else np.nan for each in told]
        for name in names
    ]  # ratings are 1 to 5, so that their keys stand in order
    domain = list(range(len(keys)))
    used = {value for column in zip(*data, strict=True) for value in column if value == value}
    if len(used) < 2:
        return None
    return float(krippendorff.alpha(data, value_domain=domain, level_of_measurement=level))


def _of_annotator(name: str, items: Sequence[Item]) -> Figures:
    own = [(item, vote) for item in items for vote in item.votes if vote.annotator == name]
    times = [vote.seconds for _, vote in own if vote.seconds is not None]
    known = [
        _key(item.gold) == _key(vote.answer)
        for item, vote in own
        if item.gold is not None and vote.answer != SKIP
    ]
    return {
        "votes": sum(vote.answer != SKIP for _, vote in own),
        "skipped": sum(vote.answer == SKIP for _, vote in own),
        "flagged": sum(vote.flag for _, vote in own),
        "seconds_median": median(times) if times else None,
        "seconds_mean": mean(times) if times else None,
        "gold": interval(sum(known), len(known)),
    }


def _shown_first(items: Sequence[Item]) -> Figures:
    """Return how often the response that was shown first was chosen: 1/2 of pairs, if by chance."""
    chosen = [
        vote.shown[0] == vote.answer
        for item in items
        for vote in item.votes
        if len(vote.shown) == 2 and type(vote.answer) is int
    ]
    return interval(sum(chosen), len(chosen))


def _sources(question: str, items: Sequence[Item]) -> list[Figures]:
    """Return how often one source is preferred to another, or how each was judged."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for item in items:
        answers = [vote.answer for vote in item.votes if vote.answer != SKIP]
        if not answers or not item.sources or item.gold is not None:
            continue
        if len(item.responses) == 1:
            found[(item.sources[0],)].append(mean(map(float, answers)))
        for a, b in combinations(sorted(range(len(item.sources)), key=item.sources.__getitem__), 2):
            if item.sources[a] != item.sources[b]:
                seen = [_won(answer, a, b) for answer in answers]
                if known := [each for each in seen if each is not None]:
                    found[item.sources[a], item.sources[b]].append(mean(known))
    rows = []
    for names, values in sorted(found.items()):
        figures: Figures = {"sources": list(names), "items": len(values), "mean": mean(values)}
        if question != "rating":
            figures |= interval(sum(values), len(values))
        rows.append(figures)
    return rows


def _won(answer: Answer, a: int, b: int) -> float | None:
    """Return 1 if a was preferred to b, 0 if b to a, 1/2 for neither; None: it says nothing."""
    if type(answer) is not int:
        return 0.5
    return {a: 1.0, b: 0.0}.get(answer)
