"""What a process does with memory between two meta-iterations."""

from __future__ import annotations

import ctypes
import platform
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Have the C library keep for the next step what a step frees (glibc; others are left alone).

    By default it gives large pieces back to the system and gets them again page by page, which
    takes time in every meta-iteration.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)  # the most that it takes
