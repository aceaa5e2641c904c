"""IMDB reviews for the starter models: loading, removing duplicates, a validation split.

`--data` is either a folder with `{train,test,unsup}.jsonl.gz` (fields `text`, `label`) or the
name of the data set on the hub (`imdb`), which `datasets.load_dataset` downloads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset

HUB_SPLITS = {"train": "train", "test": "test", "unsup": "unsupervised"}
NEGATIVE, POSITIVE, UNLABELLED = 0, 1, -1


@dataclass(frozen=True, slots=True)
class Review:
    """One review: its raw text (`<br />` kept) and 1 = positive, 0 = negative, -1 = unknown."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Reviews:
    """The splits: no text stands in two of them, none twice in one (test is left as it is)."""

    train: list[Review]
    unsup: list[Review]
    valid: list[Review]
    test: list[Review]


def load_split(data: str, split: str) -> list[Review]:
    """Reads one split from the folder `data`, or from the hub if there is no such folder."""
    folder = Path(data)
    if folder.is_dir():
        file = str(folder / f"{split}.jsonl.gz")
        rows = load_dataset("json", data_files=file, split="train")
    else:
        rows = load_dataset(data, split=HUB_SPLITS[split])
    labels = rows["label"] if "label" in rows.column_names else [UNLABELLED] * len(rows)
    return [Review(text, label) for text, label in zip(rows["text"], labels, strict=True)]


def without(reviews: list[Review], seen: set[str]) -> list[Review]:
    """Drops every review whose text is in `seen`, which then holds the texts kept as well."""
    kept = []
    for review in reviews:
        key = review.text.strip()
        if key not in seen:
            seen.add(key)
            kept.append(review)
    return kept


def load_reviews(data: str, valid_size: int = 500) -> Reviews:
    """All splits: training texts that also stand in test are dropped, then duplicates.

    Validation reviews are a fixed random sample of the labelled training reviews.
    """
    test = load_split(data, "test")
    seen = {review.text.strip() for review in test}
    train = without(load_split(data, "train"), seen)
    unsup = without(load_split(data, "unsup"), seen)
    random.Random(0).shuffle(train)
    return Reviews(train[valid_size:], unsup, train[:valid_size], test)
