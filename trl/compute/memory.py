"""Keeping freed memory for the next tensor, on a CPU under Linux."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, rather than give it back to the system at once.

    glibc takes every large tensor from the system and gives it back when it is freed. The system
    clears each page of it, again and again: a sixth of the time of a PPO step of GPT-2. The most
    memory that the process ever holds stays the same; what it holds afterwards does not shrink.

    Returns:
        Whether that could be done: not for another C library, and not where the environment has
        settings of malloc, which then stand.
    """
    settled = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
    if settled or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
