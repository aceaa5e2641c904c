"""Reward functions of the recipes: each takes B texts and gives B numbers."""

from __future__ import annotations

import re

HAPPY = {
    *("happy", "happily", "smile", "smiled", "smiling", "laugh", "laughed", "laughing", "joy"),
    *("love", "loved", "fun", "friend", "friends", "play", "played", "playing", "kind", "nice"),
    *("good", "great", "hug", "hugged"),
}


def word_the(texts: list[str]) -> list[float]:
    """Count the word "the": the simplest thing that a language model can be taught."""
    return [float(len(re.findall(r"\bthe\b", text.lower()))) for text in texts]


def happy_words(texts: list[str]) -> list[float]:
    """Count different happy words, of which every one more is worth half of the last."""
    counts = (len(HAPPY & set(re.findall(r"[a-z]+", text.lower()))) for text in texts)
    return [2.0 - 2.0 * 0.5**count for count in counts]
