"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


class Clock:
    """Seconds of each phase of a step, and of the parts of a phase that come again and again.

    On a GPU a part ends when its work is handed over, not when it is done, unless a profile waits.

    Attributes:
        around: Called with the name of a part; returns a context for it to run in. A profile sets
            its own; by default there is nothing around a part but the look at the clock.
    """

    def __init__(self) -> None:
        self.around: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the phase `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the part `name` of the phase that runs."""
        with self.around(name):
            started = time.perf_counter()
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def stats(self) -> dict[str, Any]:
        """Return the phases, their parts and the total as `time/ppo/…`, in seconds."""
        phases = self.seconds | {"total": self.last - self.start}
        return {f"time/ppo/{name}": seconds for name, seconds in phases.items()}
