"""Names of models: folders that are there, or what may be one on the hub; folders of runs."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import NoReturn

HUB_NAME = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}")
"""How a repository on the Hugging Face Hub may be called."""

FIRST_ROW = {"step": 0, "episodes": 0}
"""The row of metrics.jsonl before the first step; the figures of the held-out prompts follow, if
there are any."""


def not_a_model(name: str) -> str | None:
    """Return why a name can be neither the folder of a model nor its name on the hub; None: it may.

    A GGUF file may be named too, in a folder or in a repository.
    """
    if name.endswith(".gguf"):
        name = os.path.dirname(name) or "."
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        return "is a file"
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|.*\\", name):
        return "is a path of Windows, where this is none"
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return f"does not exist{_beside(path)}"
    return None if HUB_NAME.fullmatch(name) else "is no folder, and no name that the hub can have"


def _beside(path: Path) -> str:
    """Return the folder that a path may mean, in words."""
    there = [each.name for each in path.parent.glob("*") if each.is_dir()]
    near = difflib.get_close_matches(path.name, there, 1, 0.7)
    return f" (is it {path.with_name(near[0])}?)" if near else ""


def check_plain(*paths: Path) -> None:
    """Raise for what is to be written to, and leads elsewhere: a link, a pipe, a device.

    Raises:
        FileExistsError: naming it, and where it leads.
    """
    for path in paths:
        kind = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            what = f"a link to {os.readlink(path)}" if stat.S_ISLNK(kind) else "a pipe or a device"
            told = f"what a run writes must be files and folders of its own, got {what}: delete it"
            raise FileExistsError(errno.EEXIST, told, str(path))


def has_run(folder: Path) -> bool:
    """Tell whether a run was begun in a folder that has figures or checkpoints to lose.

    A start that failed before it had any is none; a recipe alone may be the user's own.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return (folder / "recipe.yaml").exists()
    text = metrics.read_text(encoding="utf-8", errors="replace")
    first = json.dumps(FIRST_ROW, separators=(",", ":")) + "\n"
    return (folder / "checkpoints").exists() or text not in ("", first)


def refuse_run(folder: Path) -> NoReturn:
    """Raise for a folder in which there is a run already."""
    way = "go on with it by resume='auto' (trl train … --resume), or name another one"
    raise FileExistsError(f"`out` must be a folder without a run: {way}: {str(folder)!r}")
