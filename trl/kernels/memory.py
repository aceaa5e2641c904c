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
MOST = 1.3
"""How many times what was in use at once is held, before what is free of it is given back."""


_IN_MAPS, _IN_HEAP = 4, 7
"""Where struct mallinfo2 has the bytes of large blocks, and of those that are in use otherwise."""


class _Kept:
    """What this process, which has one malloc, keeps."""

    level: int | None = None
    """The most bytes that were in use at once, as far as that was looked at; None: malloc does as
    it likes."""
    others = 0
    """Bytes that the process holds besides."""


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2, ten sizes."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, rather than give it back to the system at once.

    glibc takes every large tensor from the system and gives it back when it is freed. The system
    clears each page of it, again and again: a sixth of the time of a PPO step of GPT-2. Tensors of
    ever other sizes leave holes in what is kept, so it grows: call `give_back_memory` where much
    is in use.

    Returns:
        Whether that could be done: not for another C library (or a glibc before 2.33), and not
        where the environment has settings of malloc, which then stand.
    """
    if platform.system() != "Linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return False
    kept = _told(_MMAP_MAX, 0) and _told(_TRIM_THRESHOLD, -1)
    if kept and _Kept.level is None:
        _Kept.level = _in_use()
        _Kept.others = max(0, _held() - _Kept.level)
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
    """Give what is free back to the system, if much more is held than was ever in use at once.

    It takes half a millisecond to look, and nothing where nothing is kept.
    """
    if _Kept.level is None:
        return
    _Kept.level = max(_Kept.level, _in_use())
    if _held() - _Kept.others > MOST * _Kept.level:
        ctypes.CDLL(None).malloc_trim(0)


def _in_use() -> int:
    """Return the bytes that the program has from malloc."""
    look = ctypes.CDLL(None).mallinfo2
    look.restype = _Heap
    sizes = look().sizes
    return int(sizes[_IN_HEAP] + sizes[_IN_MAPS])


def _held() -> int:
    """Return the bytes of memory that the process has."""
    with open("/proc/self/statm", "rb") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
