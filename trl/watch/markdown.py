"""Texts of unknown origin, shown as they are: in a terminal, on a page, in tables of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

UNSEEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
"""Control characters, and those that turn the direction of what follows."""


def visible(text: Any) -> Any:
    """Return a text of unknown origin fit to be shown: signs that cannot be seen are named.

    Control characters and those that turn the direction of the text become ‹U+202E›, halves of
    surrogate pairs the replacement character. What is no text, or is HTML already, stays.
    """
    if not isinstance(text, str) or hasattr(text, "__html__"):
        return text
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return re.sub(UNSEEN, lambda sign: f"‹U+{ord(sign.group()):04X}›", text)


def markdown_table(
    names: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """Return a table of cells that are Markdown; `numbers`: all but the first column are some."""
    others = "---:" if numbers else "---"
    lines = [names, ["---", *[others] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it, on one line."""
    text = " ".join(text.split())
    return re.sub(r"([\\|`*_\[\]#~])", r"\\\1", text).replace("<", "&lt;")
