"""Markdown tables in which texts are shown as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


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
