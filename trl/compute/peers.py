"""A process that fails tells the others why, and none of them is left waiting.

By itself, a process that waits for one that has failed ends minutes later, or with "Connection
closed by peer". Here each process watches the store that torch.distributed keeps for all of them:
one that fails leaves its reason there before it ends. The others say whose it was, and end too.
A process that was killed leaves nothing; it is known by its heart, which beats no more.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from types import TracebackType

import torch.distributed
from accelerate import Accelerator

BEAT = 0.25
"""Seconds between two looks at the store."""
HEARD = 2.0
"""Seconds that a failing process waits for the others to have heard of it, at most."""
GRACE = 5.0
"""Seconds in which a process may end by itself after another has failed."""

_peers: Peers | None = None


def watch_peers(accelerator: Accelerator) -> None:
    """Let this process and the others of its run end together; once, however many trainers."""
    global _peers
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _peers is None and distributed and accelerator.num_processes > 1:
        _peers = Peers(accelerator.process_index, accelerator.num_processes)


def report_failure(error: BaseException) -> str | None:
    """Tell the other processes that this one ends by `error`.

    Returns:
        If it only ends since another has failed, which one that was, and why; else None.
    """
    return None if _peers is None else _peers.report(error)


class Peers:
    """Watches the other processes, from a thread of its own.

    Args:
        rank: Of this process.
        world: Number of processes.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        default = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.PrefixStore("trl-peers", default)
        self._failure: str | None = None
        self._reported = False
        self._hook = sys.excepthook
        sys.excepthook = self._excepthook
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trl-peers", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        """Stop watching: a thread in the store's C++ would abort a process that is ending."""
        self._ending.set()
        self._thread.join(timeout=GRACE)

    def report(self, error: BaseException) -> str | None:
        """See `report_failure`."""
        if self._reported:
            return None
        self._reported = True
        if isinstance(error, RuntimeError):  # as of a collective that others have left
            other = self._failure or self._failure_in_store() or self._silent()
            if other is not None:
                return other
        reason = f"rank {self.rank} failed: {type(error).__name__}: {error}"[:2000]
        try:
            self._store.set("failure", f"{self.rank}|{reason}")
            others = [f"heard/{rank}" for rank in range(self.world) if rank != self.rank]
            until = time.monotonic() + HEARD
            while time.monotonic() < until and not self._store.check(others):
                time.sleep(BEAT / 5)
        except (RuntimeError, OSError):
            pass  # the store is gone, and with it the others
        return None

    def _excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Report what ends this process; where it is another's failure, say so in a line."""
        other = self.report(error)
        if other is None:
            self._hook(kind, error, trace)
        else:
            print(f"rank {self.rank} stops, since {other}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Beat, and look for a failure; end this process if it cannot do so by itself."""
        beats = 0
        try:
            while (failure := self._failure_in_store()) is None:
                beats += 1
                self._store.set(f"alive/{self.rank}", str(beats))
                if self._ending.wait(BEAT):
                    return
            if self._reported:  # it was this one
                return
            self._failure = failure
            self._store.set(f"heard/{self.rank}", "1")
        except (RuntimeError, OSError):
            return  # the process that keeps the store has ended
        if self._ending.wait(GRACE):
            return
        print(f"rank {self.rank} stops, since {failure}", file=sys.stderr, flush=True)
        os._exit(1)

    def _failure_in_store(self) -> str | None:
        """Return the failure of another process, if there is one."""
        if not self._store.check(["failure"]):
            return None
        rank, _, reason = self._store.get("failure").decode().partition("|")
        return None if int(rank) == self.rank else reason

    def _silent(self) -> str | None:
        """Return that another process was killed, if its heart stands."""
        try:
            before = [self._store.get(f"alive/{rank}") for rank in range(self.world)]
            time.sleep(4 * BEAT)
            if (failure := self._failure_in_store()) is not None:
                return failure
            after = [self._store.get(f"alive/{rank}") for rank in range(self.world)]
        except (RuntimeError, OSError):
            return "the process that keeps the store of the run, rank 0, has ended"
        pairs = zip(before, after, strict=True)
        silent = [rank for rank, (old, new) in enumerate(pairs) if old == new and rank != self.rank]
        if not silent:
            return None
        named = " and ".join(f"rank {rank}" for rank in silent)
        return f"{named} ended without a word: killed from outside, by the system or by hand?"
