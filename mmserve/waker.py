"""A file descriptor that becomes readable when any thread or signal handler asks for it.

Blocking polls register it beside their own descriptors so that they can be interrupted. Knows
nothing about what is polled.
"""

from __future__ import annotations

import contextlib
import os
import threading


class Waker:
    """An eventfd. `wake` may be called from anywhere, also after `close`; the rest by the owner."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # without the lock a wake that races close could write into a reused descriptor number;
        # re-entrant because a signal handler may wake while its own thread is inside
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        with self._lock:
            if self._fd >= 0:
                # a full counter means that the descriptor is readable already
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make the descriptor unreadable until the next `wake`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
