"""A process that fails tells the others why, and none of them is left waiting.

By itself, a process that waits for one that has failed ends minutes later, or with "Connection
closed by peer". Here each process watches the store that torch.distributed keeps for all of them:
one that fails leaves its reason there before it ends. The others say whose it was, and end too.
A process that was killed, or that a cut link keeps away, leaves nothing; it is known by its heart,
which beats no more: after seconds where the next one can see that it is gone, on the same machine,
and else after a minute, in which it may only be slow. Each process listens to the heart of the
next, so that many cost the store no more than few.
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch.distributed
from accelerate import Accelerator

BEAT = 0.25
"""Seconds between two looks at the store."""
HEARD = 2.0
"""Seconds for which a failing process lets the others hear of it."""
GRACE = 5.0
"""Seconds in which a process may end by itself after another has failed."""
SILENCE = 60.0
"""Seconds after which a process that is not heard of counts as lost, if not sooner."""
LOST = "killed from outside, by the system, or is the link to it cut?"

_peers: Peers | None = None


def watch_peers(accelerator: Accelerator, timeout: float) -> None:
    """Let this process and the others of its run end together; once, however many trainers.

    Args:
        accelerator: Of this process.
        timeout: Seconds that an exchange may take: who is silent for as long is lost in any case.
    """
    global _peers
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _peers is None and distributed and accelerator.num_processes > 1:
        _peers = Peers(accelerator.process_index, accelerator.num_processes, timeout)


def meet() -> None:
    """Wait for the other processes, for as long as they live.

    A collective waits for its timeout, no longer; before one, a process may write to a disk, or
    wait for a person.
    """
    if _peers is not None:
        _peers.meet()


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
    """Watches the other processes, from threads of its own.

    Args:
        rank: Of this process.
        world: Number of processes.
        timeout: Seconds of silence after which another, or the store, is lost, if below `SILENCE`.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world = rank, world
        default = torch.distributed.distributed_c10d._get_default_store()
        # With a link of its own: that of the group is taken for as long as a process waits on it.
        self._store = torch.distributed.PrefixStore("trl-peers", default).clone()
        self._store.set(f"host/{rank}", socket.gethostname())
        self._store.set(f"place/{rank}", f"{_machine()} {os.getpid()}")
        self._store.set(f"alive/{rank}", "")
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeper = ("torchrun, the launcher of " if by_launcher else "") + self._name(0)
        self._patience, self._answered = min(timeout, SILENCE), time.monotonic()
        self._failure: str | None = None  # of another
        self._own: bool | None = None  # whether the failure that ends this process is its own
        self._meetings = 0
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - open until the end
        self._hook = sys.excepthook
        sys.excepthook = self._excepthook
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=target, name="trl-peers", daemon=True)
            for target in (self._listen, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)
        Finalize(None, self._end, exitpriority=0)  # a child of multiprocessing runs no `atexit`

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._store.get(f'host/{rank}').decode()}"

    def meet(self) -> None:
        """Wait until all processes have come here as often as this one.

        Raises:
            RuntimeError: if one of them has failed, or the store is gone.
        """
        self._meetings += 1
        key, started = f"meeting/{self._meetings}", time.monotonic()
        there = self._store.add(key, 1)
        while there < self.world:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            time.sleep(min(BEAT, 1e-3 + (time.monotonic() - started) / 10))
            there = self._store.add(key, 0)
        if self.rank == 0:  # all have left the one before
            self._store.delete_key(f"meeting/{self._meetings - 1}")

    def _end(self) -> None:
        """Stop watching: a thread in the store's C++ would abort a process that is ending."""
        if self._own is None and not self._ending.is_set():
            with suppress(RuntimeError, OSError):
                self._ask(lambda: self._store.set("ended", ""))
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=HEARD)

    def _excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Report what ends this process; where it is another's failure, say so in a line."""
        if self._own is None:
            self.tell(error)
        if self._own:
            self._hook(kind, error, trace)

    def tell(self, error: BaseException) -> None:
        """Tell the others that this process ends by an error, unless it is for one of theirs."""
        # A RuntimeError may be that of a collective which others have left.
        self._own = not (isinstance(error, RuntimeError) and self._another_has_failed())
        if not self._own:
            self._say_whose()
            return
        with suppress(RuntimeError, OSError):  # the store is gone, and with it the others
            self._ask(lambda: self._report(f"failed: {type(error).__name__}: {error}"[:2000]))
            time.sleep(HEARD)

    def _report(self, what: str, rank: int | None = None) -> str:
        """Let the others hear what has become of a process; None: of this one."""
        failure = f"{self._name(self.rank if rank is None else rank)} {what}"
        self._store.set("failure", f"{self.rank} {failure}")
        return failure

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
        """Say whose failure it is, and end soon: a group may wait for what is lost at exit."""
        faulthandler.dump_traceback_later(GRACE, exit=True, file=self._nowhere)
        print(f"rank {self.rank} stops, since {self._failure}", file=sys.stderr, flush=True)

    def _listen(self) -> None:
        """Beat, and hear of failures and of the next process, while the store is there."""
        store, following = self._store.clone(), (self.rank + 1) % self.world
        heart, last, heard = f"alive/{following}", b"", time.monotonic()
        with suppress(RuntimeError, OSError):  # the store is gone: `_watch` sees to that
            for beats in count():
                store.set(f"alive/{self.rank}", str(beats))
                if store.check(["failure"]):
                    by, _, said = store.get("failure").decode().partition(" ")
                    if by != str(self.rank):
                        self._failure = said
                        return
                now = self._answered = time.monotonic()
                beat = store.get(heart) if store.check([heart]) else b""
                if store.check(["ended"]):
                    self._patience = math.inf  # the others end too, each in its time
                elif beat != last:
                    last, heard = beat, now
                elif now - heard > self._patience or (
                    beat and now - heard > HEARD and _is_gone(store.get(f"place/{following}"))
                ):
                    what = f"was not heard of for {now - heard:.0f} s: {LOST}"
                    self._failure = self._report(what, following)
                    return
                if self._ending.wait(BEAT):
                    return

    def _watch(self) -> None:
        """End this process if it cannot do so by itself, after the failure of another."""
        while self._failure is None:
            if time.monotonic() - self._answered > self._patience:
                silent = f"nothing was heard of it for {self._patience:.0f} s: {LOST}"
                self._failure = f"{self._keeper} keeps the store of the run, and {silent}"
            elif self._ending.wait(BEAT):
                return
        if not self._ending.wait(GRACE):
            self._say_whose()
            os._exit(1)

    def _another_has_failed(self) -> bool:
        """Return whether another process has reported a failure, or is lost: no heart beats."""
        if self._failure is not None:
            return True
        others = [rank for rank in range(self.world) if rank != self.rank]
        hearts = [f"alive/{rank}" for rank in others]
        try:
            before = self._ask(lambda: self._store.multi_get(hearts))
            time.sleep(4 * BEAT)  # in which `_listen` hears what was reported
            after = self._ask(lambda: self._store.multi_get(hearts))
            beats = zip(others, before, after, strict=True)
            silent = [rank for rank, old, new in beats if old == new]
            named = self._ask(lambda: " and ".join(map(self._name, silent)))
        except (RuntimeError, OSError):
            named = f"{self._keeper}, which keeps the store of the run,"
        if self._failure is None and named:
            self._failure = f"{named} ended without a word: {LOST}"
        return self._failure is not None


def _machine() -> str:
    """Return what tells apart where a number names a process; empty: not known, but on Linux."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_gone(place: bytes) -> bool:
    """Return whether a process has ended for certain, as only one on this machine is known to."""
    machine, _, number = place.decode().rpartition(" ")
    if not machine or machine != _machine():
        return False
    try:
        return psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
