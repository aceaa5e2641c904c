"""Calls of code that may take too long: side by side, with an end to the wait for each.

A thread cannot be ended: one that hangs keeps its thread, is counted and named. What may hang often
runs in a child process, which can.
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from trl.environments.contract import EpisodeError, Words
from trl.evaluation.scores import described, result_of

WORKERS = 32
"""Threads at work at a time: with more, what computes would wait for the others beyond its time."""
GRACE = 5.0
"""Seconds that starting and ending a child may take, beside its own."""
LATE, ENDED = "it took longer than {:g} seconds.", ", and was ended."
LOOP_ANSWERS = 1.0
"""Seconds after which an event loop that does nothing more is taken for blocked."""

Put = Callable[[Any], None]


class Late(Words):
    """Code did not answer in its time, and was ended."""


class Hangs(Late):
    """It could not be ended, and hangs."""


class Chance:
    """Python's and NumPy's global random states as one row has them.

    Args:
        seed: Any integer ≥ 0.
    """

    def __init__(self, seed: int) -> None:
        numbers = np.random.RandomState(seed % 2**32).get_state()
        self.states: tuple[Any, Any] = random.Random(seed).getstate(), numbers

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the block draw from this row's states, and leave those of others as they were."""
        outside = random.getstate(), np.random.get_state()
        self._set(self.states)
        try:
            yield
        finally:
            self.states = random.getstate(), np.random.get_state()
            self._set(outside)

    @staticmethod
    def _set(states: tuple[Any, Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass(frozen=True)
class Job:
    """A call to be made."""

    name: str
    """Whose it is, in messages: "Maze.move"."""
    call: partial[Any]
    """Of a function that may be marked: see `contract.tool`."""
    finish: Callable[[Any], Any]
    """Makes of what it returned what is kept."""
    chance: Chance
    seconds: float

    @property
    def limit(self) -> float:
        """Seconds that it may take."""
        own: float | None = getattr(self.call.func, "seconds", None)
        return self.seconds if own is None else own

    def marked(self, mark: str) -> bool:
        """Tell whether it is to be run as the mark says."""
        return bool(getattr(self.call.func, mark, False))


class Jobs:
    """Runs calls side by side: in threads, in one event loop, or in children.

    Args:
        most_hung: So many threads may hang.
    """

    def __init__(self, most_hung: int) -> None:
        self.most_hung = most_hung
        self._hung: list[tuple[threading.Thread, str]] = []
        self._loop: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        self._told = False

    @property
    def hung(self) -> int:
        """How many threads hang now."""
        self._hung = [each for each in self._hung if each[0].is_alive()]
        return len(self._hung)

    def run(self, jobs: Sequence[Job | Exception | None]) -> list[Any]:
        """Return what each call returned, or the exception that it raised; what is none, as it is.

        Raises:
            EpisodeError: if too many threads hang.
        """
        found: list[Any] = list(jobs)
        chosen = [index for index, job in enumerate(jobs) if isinstance(job, Job)]
        alone = [index for index in chosen if found[index].marked("serial")]
        before = _drawn()
        self._together([index for index in chosen if index not in alone], found)
        if _drawn() != before and not self._told:
            self._told = True
            names = ", ".join(sorted({job.name for job in jobs if isinstance(job, Job)}))
            warnings.warn(
                f"Python's or NumPy's global random state changed while {names} ran side by side: "
                "what is drawn is not the same when a run is resumed. Mark what draws with "
                "@trl.environments.tool(serial=True), or draw from a generator of its own.",
                stacklevel=3,
            )
        for index in alone:
            with found[index].chance.swapped_in():
                self._together([index], found)
        return found

    def _together(self, chosen: Sequence[int], found: list[Any]) -> None:
        """Put the answers of the chosen jobs in their places, when all are there or late."""
        answers = SimpleQueue[tuple[int, Any]]()
        tasks = [index for index in chosen if _is_async(found[index])]
        waiting = deque(index for index in chosen if index not in tasks)
        running: dict[int, tuple[float, Callable[[], Exception]]] = {}

        def begin(index: int) -> None:
            job, put = found[index], lambda answer: answers.put((index, answer))
            stop = self._as_task(job, put) if index in tasks else self._in_thread(job, put)
            more = GRACE if job.marked("process") else 0
            running[index] = time.monotonic() + job.limit + more, stop

        for index in tasks:
            begin(index)
        while waiting or running:
            while waiting and len(running) < WORKERS + len(tasks):
                begin(waiting.popleft())
            first = min(until for until, _ in running.values())
            try:
                index, answer = answers.get(timeout=max(0.0, first - time.monotonic()))
            except Empty:  # all that came in time has been heard
                now = time.monotonic()
                for index in [each for each, (until, _) in running.items() if until <= now]:
                    found[index] = running.pop(index)[1]()
                continue
            if isinstance(answer, KeyboardInterrupt):
                raise answer
            if running.pop(index, None):
                found[index] = answer

    # -- the three ways ------------------------------------------------------------------------

    def _in_thread(self, job: Job, put: Put) -> Callable[[], Exception]:
        make = _in_child if job.marked("process") else _made

        def work() -> None:
            try:
                put(make(job))
            except BaseException as error:  # also SystemExit, and what else a tool may raise
                put(error)

        thread = threading.Thread(target=work, name=job.name, daemon=True)
        thread.start()
        return lambda: self._is_hung(thread, job.name, LATE.format(job.limit))

    def _as_task(self, job: Job, put: Put) -> Callable[[], Exception]:
        async def work() -> None:
            asyncio.current_task().set_name(job.name)  # type: ignore[union-attr]
            try:
                put(job.finish(await job.call()))
            except BaseException as error:  # the loop would end by a SystemExit
                put(error)

        (loop, thread), late = self.loop(), LATE.format(job.limit)
        future = asyncio.run_coroutine_threadsafe(work(), loop)

        def stop() -> Exception:
            future.cancel()
            if self._loop != (loop, thread):  # which has been found to hang
                return Hangs(late)
            answers = threading.Event()
            loop.call_soon_threadsafe(answers.set)
            if answers.wait(LOOP_ANSWERS):
                return Late(late.removesuffix(".") + ENDED)
            self._loop = None
            blocks = asyncio.current_task(loop)
            return self._is_hung(thread, blocks.get_name() if blocks else job.name, late)

        return stop

    def loop(self) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        """Return the event loop, which clients of one batch may still use in the next."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="event loop", daemon=True)
            thread.start()
            self._loop = loop, thread
        return self._loop

    def finished(self, value: Any) -> Any:
        """Wait for what is a coroutine, in the event loop; return anything else as it is."""
        if not inspect.iscoroutine(value):
            return value
        return asyncio.run_coroutine_threadsafe(value, self.loop()[0]).result()

    def close(self) -> None:
        """End the event loop."""
        if self._loop is not None:
            loop, thread = self._loop
            loop.call_soon_threadsafe(loop.stop)
            thread.join(LOOP_ANSWERS)
            if not thread.is_alive():
                loop.close()
            self._loop = None

    # -- what is told --------------------------------------------------------------------------

    def _is_hung(self, thread: threading.Thread, name: str, late: str) -> Exception:
        """Count a thread that hangs."""
        self._hung.append((thread, name))
        fix = (
            "mark what hangs with @trl.environments.tool(process=True), which runs it in a child "
            "that is killed, or give it more time (`seconds`)"
        )
        if self.hung > self.most_hung:
            names = ", ".join(sorted({each for _, each in self._hung}))
            raise EpisodeError(
                f"`most_hung` must be >= the threads that hang, got {self.hung} in {names}, and "
                f"{self.most_hung} may: {fix}."
            )
        warnings.warn(
            f"{name} does not end: {late} Its thread hangs, {self.hung} of at most "
            f"{self.most_hung}; {fix}.",
            stacklevel=2,
        )
        return Hangs(late)


def _drawn() -> Any:
    """Return the global random states in a form that can be compared."""
    numbers: Any = np.random.get_state()
    return random.getstate(), numbers[1].tobytes(), numbers[2:]


def _made(job: Job) -> Any:
    """Make a call."""
    return job.finish(result_of(job.call()))


def _is_async(job: Job) -> bool:
    return inspect.iscoroutinefunction(job.call.func) and not job.marked("process")


# -- children --------------------------------------------------------------------------------------

_forking = threading.Lock()
"""A child that is forked while another's pipe is made would keep it open."""


def _in_child(job: Job) -> Any:
    """Make a call in a child process, which is killed when its time is over.

    Raises:
        Late: when that is so.
        Words: if the call raised, or the child ended.
    """
    fork = multiprocessing.get_context("fork")  # the function need not be one that can be imported
    with _forking, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has not
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=_be_child, args=(job, theirs), daemon=True)
        child.start()
        theirs.close()
    try:
        if not ours.poll(job.limit):
            raise Late(LATE.format(job.limit).removesuffix(".") + ENDED)
        worked, answer, job.chance.states = ours.recv()
    except EOFError:
        raise Words("it ended without an answer.") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # with what it has started
        child.kill()
        child.join()
        child.close()
        ours.close()
    if not worked:
        raise Words(answer)
    return answer


def _be_child(job: Job, answers: Connection) -> None:
    os.setsid()
    for each in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job.limit + GRACE)  # if nobody is there to kill it
    try:
        with job.chance.swapped_in():
            found = True, _made(job)
    except BaseException as error:
        found = False, described(error)
    answers.send((*found, job.chance.states))
