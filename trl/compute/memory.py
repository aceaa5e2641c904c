"""Keeping freed memory for the next tensor, or giving it back, on a CPU under Linux."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_LARGE = 2**20
"""Bytes of a tensor that is given back by itself."""
_MAPPED = 2**16
"""How many tensors may be: glibc's own number."""
SETTLED = 2
"""Steps after which the memory held is what a step needs."""
MOST = 1.5
"""How many times as much is given back."""


class _Kept:
    """What this process, which has one malloc, keeps."""

    steps = 0
    """Since it was last given back."""
    level: int | None = None
    """The bytes held after the first few of them; None: nothing is kept."""


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, rather than give it back to the system at once.

    glibc takes every large tensor from the system and gives it back when it is freed. The system
    clears each page of it, again and again: a sixth of the time of a PPO step of GPT-2. Tensors of
    ever other sizes leave holes in what is kept, so it grows from step to step: call
    `give_back_memory` after each.

    Returns:
        Whether that could be done: not for another C library, and not where the environment has
        settings of malloc, which then stand.
    """
    kept = _told(_MMAP_MAX, 0) and _told(_TRIM_THRESHOLD, -1)
    if kept and _Kept.level is None:
        _Kept.steps = _Kept.level = 0
    return kept


def give_back_at_once() -> bool:
    """Let malloc give each large tensor back to the system when it is freed: for sharded weights.

    By itself glibc keeps what is smaller than 32 MB: layers that are gathered and let go of leave
    holes, which made the peak of a step with GPT-2 on two processes twice as high.

    Returns:
        Whether that could be done, as above.
    """
    _Kept.level = None
    told = _told(_MMAP_MAX, _MAPPED) and _told(_TRIM_THRESHOLD, _LARGE)
    return told and _told(_MMAP_THRESHOLD, _LARGE)


def _told(option: int, value: int) -> bool:
    """Tell malloc, if it is glibc's and has no settings yet."""
    settled = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
    if settled or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(option, value))


def give_back_memory() -> None:
    """Give what is kept back to the system, if it has grown by half since a step needed it all.

    Takes some microseconds where it has not, or where nothing is kept.
    """
    if _Kept.level is None:
        return
    with open("/proc/self/statm", "rb") as numbers:
        held = int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    _Kept.steps += 1
    if _Kept.steps <= SETTLED:
        _Kept.level = max(_Kept.level, held)
    elif held > MOST * _Kept.level:
        ctypes.CDLL(None).malloc_trim(0)
        _Kept.steps = _Kept.level = 0
