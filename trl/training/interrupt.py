"""Ctrl-C: the first ends the run after the step that is under way, the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
"""SIGTERM is what a cluster sends before it ends a job, SIGHUP a terminal that is closed."""

MESSAGE = (
    "\nStopping: this step is finished and saved first. Press Ctrl-C again to stop at once "
    "(what came after the last checkpoint is lost then).\n"
)


class GracefulStop:
    """Inside the block, `asked` tells whether the run is to end after this step.

    Outside of the main thread, where Python takes no signals, nothing changes; and a signal that is
    ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for each in set(SIGNALS):
                if signal.getsignal(each) is not signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # print() may be what was just interrupted, and cannot be entered twice.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.__stderr__.fileno(), MESSAGE.encode())
