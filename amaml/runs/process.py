"""What a process does while it makes runs: holds signals back, keeps freed memory."""

from __future__ import annotations

import ctypes
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C and SIGTERM back until runs are where they can be resumed from.

    Gives a function that says whether one has come; it takes effect at the end of the block, and
    a second one at once. Only the main thread receives signals: in others nothing is held back.
    """
    received: list[int] = []

    def note(number, frame) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(number) not in (None, signal.SIG_IGN):
            handlers[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@cache
def keep_freed_memory() -> None:
    """Keep freed memory in glibc's malloc, from now on.

    By default large pieces go back to the system and come again page by page, which takes time in
    every meta-iteration. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)  # the most that it takes
