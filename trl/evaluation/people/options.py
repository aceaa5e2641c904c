"""The options of `trl label`, as `argparse` is told of them; nothing is imported for them."""

from __future__ import annotations

from typing import Any

FORMS = ("trl", "trl-preference", "argilla", "argilla-flat", "label-studio", "ultrafeedback")
"""Of files of votes, see `formats`."""


def _word(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": text} | more


def _number(default: float, text: str) -> dict[str, Any]:
    text = f"{text} (default: {default:g})"
    return _word("N", text, type=type(default), default=default)


LABEL: dict[str, dict[str, Any]] = {
    "--from": _word(
        "SOURCE",
        "the folders of runs, files with responses, or one of prompts for --model",
        nargs="+",
        dest="sources",
    ),
    "--model": _word("MODEL", "let it answer the prompts; once each", action="append"),
    "--store": _word("FILE", "the file of items and votes; default: beside the source"),
    "--question": _word(
        "QUESTION",
        "pair: which of two is better, rating: 1 to 5, thumbs: good or bad, best: of up to "
        "four; default: as before, or pair",
        choices=("pair", "rating", "thumbs", "best"),
    ),
    "--per-item": _word("N", "people who judge each item (default: 1)", type=int),
    "--guidelines": _word("FILE", "how to judge, in Markdown; shown on the page"),
    "--annotator": _word("NAME", "who judges; once each", action="append"),
    "--with-votes": {"action": "store_true", "help": "take over votes that a file has"},
    "--export": _word("FILE", "write items and votes, and end"),
    "--format": _word(
        "FORM",
        "of that file: trl (default), trl-preference, argilla, argilla-flat, label-studio, "
        "ultrafeedback",
        choices=FORMS,
        default="trl",
    ),
    "--agreement": _word(
        "FILE",
        "write how far people agree, and which source they prefer, and end: a page (.html) "
        "or JSON; alone: to the screen",
        nargs="?",
        const="-",
    ),
    "--max-new-tokens": _number(48, "most tokens, of --model"),
    "--temperature": _number(1.0, "divides the logits"),
    "--seed": _number(0, "of the random numbers"),
    "--host": _word("ADDRESS", "where to listen", default="127.0.0.1"),
    "--port": _number(8321, "of the page; 0: any that is free"),
    "--i-know": {
        "action": "store_true",
        "help": "listen for others too, though nothing is encrypted",
    },
}
