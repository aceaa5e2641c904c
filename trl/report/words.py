"""Which words a run writes more or less often than before."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PRIOR = 0.1
"""Weight of the prior: the share of the words seen that it counts once more."""
BEYOND_CHANCE = 1.96
"""|z| that a word which did not move exceeds one time in twenty."""

WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # kana and Han: no spaces, each sign is taken alone
    r"|[^\W_]+(?:['’][^\W_]+)*"
)


@dataclass(frozen=True, slots=True)
class MovedWord:
    """A word, how often it was written, and the z-score of its move (above 0: more often)."""

    word: str
    before: int
    after: int
    z: float


def moved_words(before: Iterable[str], after: Iterable[str]) -> list[MovedWord]:
    """Weighted log-odds of words with an informative Dirichlet prior (Monroe, Colaresi and Quinn,
    "Fightin' Words", Political Analysis 16, 2008, equation 22).

        δ_w = log((a_w + α_w) / (n_a + α_0 − a_w − α_w))
            − log((b_w + α_w) / (n_b + α_0 − b_w − α_w))
        z_w = δ_w / √(1 / (a_w + α_w) + 1 / (b_w + α_w))

    a_w and b_w count word w after and before, n are their sums. The prior is informed by both sides
    together: α_w = PRIOR · (a_w + b_w), α_0 = Σ_w α_w. Without it, words seen once would lead.

    Args:
        before: Texts before.
        after: Texts after.

    Returns:
        Every word, the one with the largest z first; equal ones in the order of the alphabet.
    """
    counts_before = Counter(word for text in before for word in words(text))
    counts_after = Counter(word for text in after for word in words(text))
    total_before, total_after = counts_before.total(), counts_after.total()
    alpha_all = PRIOR * (total_before + total_after)
    vocabulary = counts_before.keys() | counts_after.keys()
    moved = []
    for word in vocabulary:
        alpha = PRIOR * (counts_before[word] + counts_after[word])
        with_word_before = counts_before[word] + alpha
        with_word_after = counts_after[word] + alpha
        z = 0.0
        if len(vocabulary) > 1:  # the only word there is has no odds
            delta = math.log(with_word_after / (total_after + alpha_all - with_word_after))
            delta -= math.log(with_word_before / (total_before + alpha_all - with_word_before))
            z = delta / math.sqrt(1 / with_word_after + 1 / with_word_before)
        moved.append(MovedWord(word, counts_before[word], counts_after[word], z))
    return sorted(moved, key=lambda entry: (-entry.z, entry.word))


def words(text: str) -> list[str]:
    """The words of a text in lower case; punctuation is left out."""
    return [match.group().casefold() for match in WORD.finditer(text)]


def marked(text: str, moved: Mapping[str, MovedWord]) -> list[tuple[str, MovedWord | None]]:
    """Cut a text at the words in `moved`; the pieces together are the text again."""
    pieces: list[tuple[str, MovedWord | None]] = []
    done = 0
    for match in WORD.finditer(text):
        entry = moved.get(match.group().casefold())
        if entry is not None:
            pieces += [(text[done : match.start()], None), (match.group(), entry)]
            done = match.end()
    return [piece for piece in [*pieces, (text[done:], None)] if piece[0]]
