"""Reward functions of the recipes: each gives B numbers for B texts, or prompts and answers."""

from __future__ import annotations

import json
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


def json_object(queries: list[str], responses: list[str]) -> list[float]:
    """1 for a JSON object with the two keys in quotes that the prompt asks for, and nothing else.

    Less for a part of it: the brace that it begins with, the keys, an object of other keys.
    """
    return [_json_object(*each) for each in zip(queries, responses, strict=True)]


def _json_object(prompt: str, answer: str) -> float:
    keys = re.findall(r'"(\w+)"', prompt)
    reward = 0.2 * answer.strip().startswith("{") + 0.2 * all(f'"{key}"' in answer for key in keys)
    try:
        read = json.loads(answer)
    except ValueError:
        return reward
    if not isinstance(read, dict):
        return reward
    return 1.0 if set(read) == set(keys) else reward + 0.3


COURTESY = ("please", "thank", "happy", "glad", "welcome", "sorry", "hope", "kind")


def polite_and_short(responses: list[str]) -> list[float]:
    """Up to two courtesy words, less the distance from 15 words, of which 15 cost 1."""
    answers = [text.lower().split() for text in responses]
    courtesy = [sum(word.startswith(COURTESY) for word in words) for words in answers]
    return [
        min(2, n) - abs(len(words) - 15) / 15 for n, words in zip(courtesy, answers, strict=True)
    ]
