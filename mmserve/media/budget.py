"""Bytes that many hold together. Knows nothing about what they are."""

from __future__ import annotations

import threading

from mmserve.errors import Overloaded


class ByteBudget:
    """At most `max_bytes` are taken at a time; None is without end. Safe to use from several threads.

    Nobody waits: who finds no room is told to come back later.
    """

    def __init__(self, max_bytes: int | None, what: str) -> None:
        self._max_bytes = max_bytes
        self._what = what
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        return self._taken

    def take(self, size: int) -> None:
        with self._lock:
            if self._max_bytes is not None and self._taken + size > self._max_bytes:
                raise Overloaded(
                    f"Expected room for {size} bytes of {self._what}, but the server holds "
                    f"{self._taken} of {self._max_bytes}; try again"
                )
            self._taken += size

    def give(self, size: int) -> None:
        with self._lock:
            self._taken -= size
