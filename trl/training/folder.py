"""The folder of a run, and its files of lines.

recipe.yaml      the resolved settings; `trl train FOLDER/recipe.yaml` runs them again
metrics.jsonl    a line of figures for each step
scores.jsonl     the scores of each step's responses
rollouts.jsonl   the first responses of each step's batch, with their scores
samples.jsonl    the responses to the held-out prompts, at each evaluation
warnings.jsonl   what looked wrong, in words
summary.json     before and after
checkpoints/     what is gone on from
best/  policy/   the best and the last policy, which plain transformers loads
critic/          the last critic, if it is one of its own
report.html      all of it to look at
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from trl.config.places import check_plain, has_run
from trl.models.checkpoint import CRITIC
from trl.training.checkpoints import disk_full_told, sync

BEST_STEP = "step.txt"
"""After which step the best policy was saved, beside it."""

DELETED = "`out` must stay where it is while a run is in it, but was deleted or moved"

LINES = ("metrics", "scores", "rollouts", "samples", "warnings")

WRITTEN = re.compile(
    r"\.?((metrics|scores|rollouts|samples|warnings)\.jsonl|(summary|trackers)\.json|recipe\.yaml|step-\d+"
    r"|report|report\.html|checkpoints|policy|critic|best|lock|tensorboard|wandb)(\.partial|\.old)?"
)
"""What a run writes to in its folder, and in that of its checkpoints."""


class RunFolder:
    """Writes the files of a run; every line is in the file when `add` returns.

    Args:
        path: The folder; it is made by `in_use`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.policy = path / "policy"
        self.critic = path / CRITIC
        self.best = path / "best"
        self.recipe = path / "recipe.yaml"
        self.report = path / "report.html"
        self.changes = False
        """Whether a run may go on that is not quite the same: `resume="changed"`."""
        self._handle: int | None = None

    def file(self, name: str) -> Path:
        """Return the path of one of the files of lines."""
        return self.path / f"{name}.jsonl"

    def has_run(self) -> bool:
        """Tell whether a run was begun here that has figures or checkpoints to lose."""
        return has_run(self.path)

    def others(self) -> list[str]:
        """Return what stands here under names that a run would write, and is not a run's."""
        names = (self.checkpoints, self.policy, self.best)
        return [] if self.has_run() else [path.name for path in names if path.exists()]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the folder, and keep other processes from running in it.

        A process that ends, however it does, leaves no lock.

        Raises:
            OSError: naming the folder, if it cannot be written, or another run is in it; naming
                a link in it, through which the run would write elsewhere.
        """
        folders = filter(Path.is_dir, (self.path, self.checkpoints))
        inside = [path for folder in folders for path in folder.glob("*")]
        check_plain(*(path for path in inside if WRITTEN.fullmatch(path.name)))
        lock = FileLock(self.path / ".lock", timeout=0)
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            self._hold()
        except OSError as error:
            lock.release()
            busy = isinstance(error, Timeout | BlockingIOError)
            rule = f"be a folder that can be written ({error.strerror}): name another one"
            if busy:
                rule = "be a folder in which no process is at work, as one is now: wait until it "
                rule += "has ended, stop it, or name another folder"
            message = f"`out` must {rule}"
            problem = BlockingIOError if busy else type(error)
            raise problem(error.errno or errno.EAGAIN, message, str(self.path)) from None
        try:
            yield
        finally:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
            lock.release()
            if new and [path.name for path in self.path.glob("*")] == [".lock"]:
                shutil.rmtree(self.path, ignore_errors=True)  # what was refused leaves nothing

    def _hold(self) -> None:
        """Lock the folder itself too: the file of a lock can be deleted."""
        if os.name == "posix":  # elsewhere no file is deleted that is open
            import fcntl

            self._handle = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # some network disks lock files only
                if isinstance(error, BlockingIOError):
                    os.close(self._handle)
                    self._handle = None
                    raise

    def check_there(self) -> None:
        """Raise a FileNotFoundError if the folder was deleted or moved since it was locked."""
        if self._handle is not None:
            there = self.path.stat() if self.path.exists() else None
            if there is None or not os.path.samestat(there, os.fstat(self._handle)):
                raise FileNotFoundError(errno.ENOENT, DELETED, str(self.path))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file of lines, without those that are cut."""
        return [json.loads(line) for line in self._lines(name) if _step_of(line) is not None]

    def _lines(self, name: str) -> list[bytes]:
        path = self.file(name)
        return path.read_bytes().splitlines(keepends=True) if path.exists() else []

    def add(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Append rows to a file of lines. NaN and infinity, which JSON has not, become null."""
        self.check_there()
        text = "".join(_line(row) for row in rows).encode()
        with disk_full_told(self.path), self.file(name).open("ab+") as lines:
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                text = (b"" if lines.read() == b"\n" else b"\n") + text  # after one that is cut
            lines.write(text)

    def record(self) -> dict[str, tuple[int, str]]:
        """Return the number and the hash of the lines of each file, which is on the disk then."""
        self.check_there()
        there = {name: self.file(name) for name in LINES if self.file(name).exists()}
        sync(*there.values())
        whole = {name: path.read_bytes().rpartition(b"\n")[:2] for name, path in there.items()}
        texts = {name: b"".join(parts) for name, parts in whole.items()}  # without one that is cut
        return {k: (x.count(b"\n"), hashlib.sha256(x).hexdigest()) for k, x in texts.items()}

    def cut(self, record: Mapping[str, Any], last: int = -1) -> list[str]:
        """Take back the lines of steps that are done again, and those that are cut or damaged.

        Args:
            record: What `record` returned after step `last`; older runs have sizes there.
            last: The lines of later steps go.

        Returns:
            What is not as it was then, a sentence for each file.
        """
        told = []
        for name in LINES:
            lines = self._lines(name)
            good = [line for line in lines if (step := _step_of(line)) is not None and step <= last]
            text = b"".join(good)
            count, digest = record[name] if isinstance(record.get(name), tuple) else (0, None)
            if digest and digest != hashlib.sha256(text).hexdigest():
                told.append(
                    f"{self.file(name)} is not as it was after step {last}: of {count} lines "
                    f"{len(good)} are there, or some were changed."
                )
            if len(good) != len(lines):
                self.write(self.file(name).name, text.decode())
        return told

    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        self.check_there()
        target = self.path / name
        partial = target.with_name(f".{target.name}.partial")
        with disk_full_told(self.path):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)


def is_at_work(folder: Path) -> bool:
    """Tell whether a process runs in a folder now."""
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=0) if lock.is_file() else nullcontext():
            return False
    except (Timeout, OSError):
        return True


def _line(row: Mapping[str, Any]) -> str:
    return TypeAdapter(Any).dump_json(row).decode() + "\n"


def _step_of(line: bytes) -> int | None:
    """Return the step that a line of a file is of; None: it is cut or damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return None


def best_step(folder: Path) -> int:
    """Return the step of a best policy; -1: there is none, or that is not known."""
    file = folder / BEST_STEP
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
