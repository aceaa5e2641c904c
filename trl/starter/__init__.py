"""Two small models trained from scratch on IMDB reviews, so that everything runs with no network.

`LANGUAGE_MODEL` is the folder of a GPT-2 of about five million parameters, `CLASSIFIER` that of a
BERT sentiment classifier with its own tokenizer. The model cards in the two folders name the data,
the recipe, the measured figures and the limits.
"""

from pathlib import Path
from typing import Literal

__all__ = ["CLASSIFIER", "LANGUAGE_MODEL", "prompts"]

_HERE = Path(__file__).resolve().parent

LANGUAGE_MODEL = _HERE / "imdb-gpt2"
"""Folder of the language model and its byte-level BPE tokenizer."""

CLASSIFIER = _HERE / "imdb-bert"
"""Folder of the sentiment classifier (labels NEGATIVE, POSITIVE) and its WordPiece tokenizer."""


def prompts(split: Literal["train", "held-out"] = "train") -> list[str]:
    """The beginnings of reviews that ship with the starter models, one per line of a text file.

    Args:
        split: "train" for tuning, "held-out" for measuring; no prompt stands in both.

    Returns:
        The prompts in the order of the file.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f'`split` must be "train" or "held-out", got {split!r}.')
    path = _HERE / f"prompts-{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"The starter prompts {path} are missing. They are part of the package: install trl "
            "again, or pass prompts of your own."
        )
    return path.read_text(encoding="utf-8").splitlines()
