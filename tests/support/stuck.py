"""A main thread that a driver keeps: it runs no Python, whatever signals come, until it is told."""

from __future__ import annotations

import ctypes
import os
import select
import sys
import threading

_LONGEST = 60.0  # seconds: a process that is never told ends itself, and its test fails


def until_told() -> None:
    """Comes back when there is something to read on stdin.

    A lock of the C library is no system call that a signal ends, as a sleep is.
    """
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_init(lock, None)
    held = threading.Event()

    def hold() -> None:
        library.pthread_mutex_lock(lock)
        held.set()
        if not select.select([sys.stdin], [], [], _LONGEST)[0]:
            os._exit(99)
        library.pthread_mutex_unlock(lock)

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    library.pthread_mutex_lock(lock)
