"""The folder of a run, and its files of lines.

recipe.yaml      the resolved settings; `trl train FOLDER/recipe.yaml` runs them again
metrics.jsonl    a line of figures for each step
scores.jsonl     the scores of each step's responses
samples.jsonl    the responses to the held-out prompts, at each evaluation
warnings.jsonl   what looked wrong, in words
summary.json     before and after
checkpoints/     what is gone on from
best/  policy/   the best and the last policy, which plain transformers loads
report.html      all of it to look at
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from trl.training.checkpoints import disk_full_told, sync

FIRST_ROW = {"step": 0, "episodes": 0}
"""The row before the first step; the figures of the held-out prompts follow, if there are any."""

LINES = ("metrics", "scores", "samples", "warnings")


class RunFolder:
    """Writes the files of a run; every line is in the file when `add` returns.

    Args:
        path: The folder; it is made by `in_use`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.policy = path / "policy"
        self.best = path / "best"
        self.recipe = path / "recipe.yaml"

    def file(self, name: str) -> Path:
        """Return the path of one of the files of lines."""
        return self.path / f"{name}.jsonl"

    def has_run(self) -> bool:
        """Tell whether a run was begun here that has figures or checkpoints to lose.

        A start that failed before it had any is none; a recipe alone may be the user's own.
        """
        metrics = self.file("metrics")
        if not metrics.exists():
            return self.recipe.exists()
        without_figures = ("", _line(FIRST_ROW))
        text = metrics.read_text(encoding="utf-8", errors="replace")
        return self.checkpoints.exists() or text not in without_figures

    def others(self) -> list[str]:
        """Return what stands here under names that a run would write, and is not a run's."""
        names = (self.checkpoints, self.policy, self.best)
        return [] if self.has_run() else [path.name for path in names if path.exists()]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the folder, and keep other processes from running in it.

        A process that ends, however it does, leaves no lock.

        Raises:
            OSError: naming the folder, if it cannot be written, or another run is in it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            busy = isinstance(error, Timeout)
            rule = "without another run" if busy else f"that can be written ({error.strerror})"
            message = f"`out` must be a folder {rule}: name another one"
            problem = BlockingIOError if busy else type(error)
            raise problem(error.errno or errno.EAGAIN, message, str(self.path)) from error
        try:
            yield
        finally:
            lock.release()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file of lines, without one that is cut."""
        text = self.file(name).read_text(encoding="utf-8") if self.file(name).exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def add(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Append rows to a file of lines. NaN and infinity, which JSON has not, become null."""
        text = "".join(_line(row) for row in rows)
        with disk_full_told(self.path), self.file(name).open("a", encoding="utf-8") as lines:
            lines.write(text)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the files of lines, which are on the disk then."""
        there = {name: self.file(name) for name in LINES if self.file(name).exists()}
        sync(*there.values())
        return {name: path.stat().st_size for name, path in there.items()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Take back what was written since: the lines of steps that are done again."""
        for name in LINES:
            path, size = self.file(name), sizes.get(name, 0)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        target = self.path / name
        partial = target.with_name(f".{name}.partial")
        with disk_full_told(self.path):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)


def _line(row: Mapping[str, Any]) -> str:
    return TypeAdapter(Any).dump_json(row).decode() + "\n"
