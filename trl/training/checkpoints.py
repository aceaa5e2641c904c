"""Checkpoints that are whole or not there.

A checkpoint is a folder that is written to the side, synced to the disk, and then renamed: at any
moment of a crash there is either the new one or none. Beside its files lies `manifest.json` with
the size and the SHA-256 of each; what does not fit them is not gone on from.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


class CheckpointError(RuntimeError):
    """No checkpoint can be gone on from; the message says what is wrong with each."""


class Checkpoints:
    """The checkpoints of a run, in one folder, named by their steps.

    Args:
        folder: Made when the first one is written.
        keep: So many stay when one is written, the latest ones.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted((path for path in found if step_of(path) is not None), key=step_of)

    def place(self, step: int) -> Path:
        """Return the folder of the one that stands after a step."""
        return self.folder / f"step-{step:06d}"

    def write(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write one, and delete those that are too many.

        Args:
            step: That it stands after.
            save: Writes files into the folder that it is given.

        Raises:
            OSError: if the disk is full or cannot be written; the others are as they were.
        """
        for left in self.folder.glob(".step-*"):  # by an earlier crash
            remove(left)
        target = self.place(step)
        with replaced_folder(target) as partial:
            save(partial)
            write_manifest(partial)
        for old in self.all()[: -self.keep]:
            remove(old)
        return target

    def newest(
        self, problem_of: Callable[[Path], str | None] | None = None
    ) -> tuple[Path | None, list[str]]:
        """Return the latest checkpoint that is whole, and what is wrong with any later ones.

        Args:
            problem_of: Returns what is wrong with one. None: `damage`.

        Raises:
            CheckpointError: if there are some, but none is whole.
        """
        for left in self.folder.glob(".step-*.old"):
            put_back(left)
        problems = []
        for path in reversed(self.all()):
            if not (problem := (problem_of or damage)(path)):
                return path, problems
            problems.append(f"{path}: {problem}")
        if problems:
            told = "; ".join(problems)
            raise CheckpointError(f"no checkpoint is whole: {told}. Start the run anew.")
        return None, []


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint stands after; None if the path is not one's."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by its manifest; None: nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = [(name, size, digest) for name, (size, digest) in manifest.items()]
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except (OSError, RecursionError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size, digest in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        if _digest(path) != digest:
            return f"{name} has other content than was written"
    return None


def check_readable(states: Mapping[str, Any]) -> None:
    """Raise a TypeError unless the states of scorers can be read back from a checkpoint."""
    for name, state in states.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError as error:
            raise TypeError(
                f"`state_dict()` of the scorer {name} must give plain values and tensors (numbers, "
                "texts, lists, dicts), or no run could be gone on with; turn numpy arrays into "
                f"lists or tensors. {str(error).splitlines()[-1]}"
            ) from None


def write_manifest(folder: Path) -> None:
    """Write down the size and SHA-256 of each file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): (path.stat().st_size, _digest(path)) for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` at the end, if all went well.

    Raises:
        OSError: of ENOSPC if the disk is full, whatever the writer made of that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    remove(partial)
    try:
        partial.mkdir()
        with disk_full_told(target.parent):
            yield partial
            sync(*partial.rglob("*"), partial)
    except BaseException:
        remove(partial)
        raise
    old = target.with_name(f".{target.name}.old")
    put_back(old)
    remove(old)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    sync(target.parent)
    remove(old)


def partial_of(target: Path) -> Path:
    """Return the folder that is written to the side, to take the place of another."""
    return target.with_name(f".{target.name}.partial")


def put_back(old: Path) -> None:
    """Give a folder its name again if a crash came between the two renames of a replacement."""
    target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.exists() and not target.exists():
        os.rename(old, target)


@contextmanager
def disk_full_told(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk makes a writer raise into an OSError that says so."""
    try:
        yield
    except Exception as error:
        code, free = getattr(error, "errno", None), shutil.disk_usage(folder).free
        # PyTorch and safetensors raise errors of their own, which do not carry the number.
        if code not in (errno.ENOSPC, errno.EDQUOT) and (code is not None or free >= 1 << 20):
            raise
        told = f"the disk is full ({free / 1e6:.0f} MB are free)"
        raise OSError(errno.ENOSPC, told, str(folder)) from error


def remove(folder: Path) -> None:
    """Delete a folder if it is there. What is left of a checkpoint, if broken off, is not whole."""
    if folder.exists():
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on the disk."""
    for path in paths if os.name == "posix" else filter(Path.is_file, paths):
        handle = os.open(path, os.O_RDONLY)  # elsewhere a folder cannot be opened
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
