"""Keeping freed memory for the next tensor, on a CPU under Linux."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
SETTLED = 2
"""Steps after which the memory held is what a step needs."""
MOST = 1.5
"""How many times as much is given back."""


class _Kept:
    """What this process, which has one malloc, keeps."""

    steps, level = 0, None
    """Steps since it was last given back, and the bytes held after the first few of them; None:
    nothing is kept."""


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
    settled = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
    if settled or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
    if kept and _Kept.level is None:
        _Kept.steps = _Kept.level = 0
    return kept


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
