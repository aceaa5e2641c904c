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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Any

import torch.distributed
from accelerate import Accelerator

BEAT = 0.25
"""Seconds between two looks at the store."""
HEARD = 2.0
"""Seconds for which a failing process lets the others hear of it."""
GRACE = 5.0
"""Seconds in which a process may end by itself after another has failed."""

_peers: Peers | None = None


def watch_peers(accelerator: Accelerator) -> None:
    """Let this process and the others of its run end together; once, however many trainers."""
    global _peers
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _peers is None and distributed and accelerator.num_processes > 1:
        _peers = Peers(accelerator.process_index, accelerator.num_processes)


@contextmanager
def told_to_peers() -> Iterator[None]:
    """Tell the other processes of a failure inside that may be caught further out."""
    try:
        yield
    except BaseException as error:
        if _peers is not None:
            _peers.tell(error)
        raise


class Peers:
    """Watches the other processes, from a thread of its own.

    Args:
        rank: Of this process.
        world: Number of processes.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self._others = [other for other in range(world) if other != rank]
        default = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.PrefixStore("trl-peers", default)
        self._failure: str | None = None  # of another
        self._told = False
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

    def _excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Report what ends this process; where it is another's failure, say so in a line."""
        if self._told or self.tell(error):
            self._hook(kind, error, trace)

    def tell(self, error: BaseException) -> bool:
        """Tell the others that this process ends by an error, unless it is for one of theirs.

        Returns:
            Whether it is its own.
        """
        self._told = True
        # A RuntimeError may be that of a collective which others have left.
        if isinstance(error, RuntimeError) and self._another_has_failed():
            self._say_whose()
            return False
        reason = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        with suppress(RuntimeError, OSError):  # the store is gone, and with it the others
            self._ask(lambda: self._store.set("failure", reason[:2000]))
            time.sleep(HEARD)
        return True

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return what the store answers; it waits for ever if the link to it is cut.

        Raises:
            RuntimeError, OSError: if the store is gone, or does not answer in `GRACE` seconds.
        """
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except (RuntimeError, OSError) as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        return answer.result(timeout=GRACE)

    def _say_whose(self) -> None:
        print(f"rank {self.rank} stops, since {self._failure}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Beat, and look for a failure; end this process if it cannot do so by itself."""
        try:
            for beats in count():
                self._store.set(f"alive/{self.rank}", str(beats))
                said = self._store.get("failure").decode() if self._store.check(["failure"]) else ""
                if said and not said.startswith(f"rank {self.rank} "):
                    break
                if self._ending.wait(BEAT):
                    return
        except (RuntimeError, OSError):
            return  # the process that keeps the store has ended
        self._failure = said
        if not self._ending.wait(GRACE):
            self._say_whose()
            os._exit(1)

    def _another_has_failed(self) -> bool:
        """Return whether another process has reported a failure, or was killed: no heart beats."""
        hearts = [f"alive/{rank}" for rank in self._others]
        try:
            before = self._ask(lambda: self._store.multi_get(hearts))
            time.sleep(4 * BEAT)  # in which `_watch` sees what was reported
            after = self._ask(lambda: self._store.multi_get(hearts))
        except (RuntimeError, OSError):
            silent = ["rank 0, which keeps the store of the run,"]
        else:
            beats = zip(self._others, before, after, strict=True)
            silent = [f"rank {rank}" for rank, old, new in beats if old == new]
        if self._failure is None and silent:
            named = " and ".join(silent)
            self._failure = f"{named} ended without a word: killed from outside, or by the system?"
        return self._failure is not None
