"""Cells: where what cannot be trusted runs, and what looks at it with no end in sight.

    with warden() as keeper, Cell(keeper, "math", until=time.monotonic() + 2, **given) as cell:
        cell.receive()

A cell is a process that is killed when its time is over, see `warden.py`. Where the kernel gives
it, it sees no process, no network and no file but Python's own, and what it leaves goes with it.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

SCRIPT = Path(__file__).with_name("warden.py")
PLACES = ("/usr", "/lib", "/lib64", "/bin", "/nix", "/dev/null", "/dev/urandom")
"""What a cell sees besides Python: libraries, and what they ask of the system."""

MEGABYTES, PROCESSES = 1024, 8
"""Most memory of each process of a cell, and most processes and threads of it."""
MOST_SAID = 2**20
"""Bytes of what a cell may answer."""
LONGEST_START, LONGEST_END = 120.0, 5.0
"""Seconds for a warden, with its libraries, to be ready; and for a cell to be ended."""
WORKERS = min(4, os.cpu_count() or 1)
"""Cells at the same time."""

Item, Found = TypeVar("Item"), TypeVar("Found")


class CellError(Exception):
    """A cell has ended, or its time has, before it answered; or it said what is no answer."""


class Warden:
    """A process that opens cells, one at a time.

    Args:
        modules: What the programs of its cells import.
        isolated: Whether its cells are to have a world of their own, if the system can give it.

    Attributes:
        missing: What of that the system does not give, in words; none: nothing.
        is_half: It could leave the system's world, but not have its own: it has ended.

    Raises:
        ImportError: for a module that is not installed.
        RuntimeError: if it does not start.
    """

    def __init__(self, modules: Sequence[str], isolated: bool = True) -> None:
        prefixes = {sys.base_prefix, sys.prefix, sys.exec_prefix}
        own = {"site-packages", "dist-packages"}
        paths = [p for p in sys.path if own & set(Path(p).parts) or _inside(p, prefixes)]
        settings = {
            "modules": list(modules),
            "paths": paths,
            "places": _outermost([*PLACES, *prefixes, *paths]),
            "isolated": isolated,
            "megabytes": MEGABYTES,
            "processes": PROCESSES,
        }
        self.control, theirs = socket.socketpair()
        # In a session of its own, that Ctrl-C does not end it, and with an empty environment.
        command = [sys.executable, "-I", "-S", "-B", str(SCRIPT), json.dumps(settings)]
        null = subprocess.DEVNULL
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=null, stderr=null, env={}, start_new_session=True
            )
        try:
            told = json.loads(_line(self.control, time.monotonic() + LONGEST_START))
        except (CellError, ValueError):
            told = {"failed": True}
        if told.keys() & {"again", "error", "failed"}:
            self.end()
        if "error" in told:
            raise ImportError(f"What checks answers cannot be loaded ({told['error']}).")
        if "failed" in told:
            raise RuntimeError(f"{SCRIPT.name}, the process that checks answers, did not start.")
        self.is_half = "again" in told
        self.missing = [] if told["isolated"] else ["other processes", "the network", "files"]
        self.missing += [] if told["counted"] else ["the number of processes"]

    def end(self) -> None:
        """End it, and with it all of its cells."""
        self.control.close()
        self.process.kill()
        self.process.wait()


def _inside(path: str, folders: set[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _outermost(places: Sequence[str]) -> list[str]:
    """Return those that are there and lie in no other of them."""
    there = {place for place in places if os.path.exists(place)}
    return sorted(place for place in there if not _inside(place, there - {place}))


_idle: dict[Any, list[Warden]] = {}
_lock = Lock()


@contextmanager
def warden(*modules: str) -> Iterator[Warden]:
    """Lend a warden to one thread: one that waits, or a new one."""
    # A process that was forked off must not talk to those of its parent.
    with _lock:
        waiting = _idle.setdefault((os.getpid(), modules), [])
        one = waiting.pop() if waiting else None
    if one is not None and one.process.poll() is not None:
        one.end()
        one = None
    one = one or Warden(modules)
    one = Warden(modules, isolated=False) if one.is_half else one
    try:
        yield one
    except BaseException:  # in what state it is, nobody knows
        one.end()
        raise
    with _lock:
        waiting.append(one)


@atexit.register
def end_all() -> None:
    """End the wardens that wait: what was begun is over, and the next check starts new ones."""
    with _lock:
        for (process, _), waiting in _idle.items():
            while waiting and process == os.getpid():
                waiting.pop().end()


class Cell:
    """A process that runs one program of `programs.py`.

    Args:
        keeper: Whose it is; it has no other at the same time.
        program: Its name.
        until: When its time is over, by `time.monotonic`.
        peer: Of a pair of sockets, whose other one another cell has.
        **given: What the program gets.

    Raises:
        CellError: if the program could not be sent all of it in time.
    """

    def __init__(
        self,
        keeper: Warden,
        program: str,
        *,
        until: float,
        peer: socket.socket | None = None,
        **given: Any,
    ) -> None:
        self.keeper, self.until = keeper, until
        self.socket, theirs = socket.socketpair()
        with theirs:
            handles = [each.fileno() for each in (theirs, peer) if each is not None]
            try:
                socket.send_fds(keeper.control, [b"+"], handles)
            except OSError as error:
                self.socket.close()
                raise CellError from error
        self.send({"program": program, **given})

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *error: object) -> None:
        if self.socket.fileno() >= 0:
            self.end()

    def send(self, message: Any) -> None:
        """Send a message."""
        try:
            self.socket.settimeout(max(0.001, self.until - time.monotonic()))
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise CellError from error

    def receive(self) -> Any:
        """Return the next message."""
        try:
            return json.loads(_line(self.socket, self.until))
        except (ValueError, RecursionError) as error:
            raise CellError from error

    def rest(self) -> bytes:
        """Return all that it writes until it ends, as bytes."""
        return _read(self.socket, self.until, lambda found: False)

    def end(self) -> bool:
        """End it; tell whether it had ended by itself, with exit code 0.

        Raises:
            CellError: if that takes longer than it may; its warden is of no use then.
        """
        self.socket.close()
        try:
            self.keeper.control.settimeout(LONGEST_END)
            self.keeper.control.sendall(b"-")
            told = _read(self.keeper.control, time.monotonic() + LONGEST_END, _is_whole)
        except (OSError, CellError) as error:
            self.keeper.end()
            raise CellError from error
        return told == b"end"


def _is_whole(told: bytes) -> bool:
    return len(told) >= 3


def _line(from_: socket.socket, until: float) -> bytes:
    found = _read(from_, until, lambda found: found.endswith(b"\n"))
    if not found.endswith(b"\n"):
        raise CellError("it has ended")
    return found


def _read(from_: socket.socket, until: float, is_all: Callable[[bytes], bool]) -> bytes:
    """Return what comes until it is all, or there is no more.

    Raises:
        CellError: if that is not there in time, or is too much.
    """
    found = bytearray()
    try:
        while not is_all(found):
            from_.settimeout(max(0.001, until - time.monotonic()))
            more = from_.recv(2**16)
            found += more
            if not more:
                break
            if len(found) > MOST_SAID or time.monotonic() > until:
                raise CellError("it says too much")
    except OSError as error:  # a timeout is one
        raise CellError from error
    return bytes(found)


def in_threads(function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Return what a function, which opens cells, makes of each item, several at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))


def ask(program: str, modules: Sequence[str], seconds: float, **question: Any) -> Any:
    """Return what a program that imports some modules answers; None: nothing, in time."""
    with suppress(CellError), warden(*modules) as keeper:
        until = time.monotonic() + seconds
        with Cell(keeper, program, until=until, **question) as cell, suppress(CellError):
            return cell.receive()
    return None
