"""A thread for what may hang, so that whoever asks waits no longer than they want to.

A name server, a connect, and a server that sends a byte now and then each escape a socket's time limit.
Knows nothing about what it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from mmserve.encoders.tiers.base import TierError

T = TypeVar("T")


class _Job(Generic[T]):
    """Results come in one-tuples; an error or None ends them."""

    def __init__(self, task: Callable[[], Iterable[T]]) -> None:
        self.is_wanted = True
        self.results: SimpleQueue[tuple[T] | TierError | None] = SimpleQueue()
        self._task = task

    def run(self) -> TierError | None:
        """How it ended."""
        try:
            for result in self._task():
                if not self.is_wanted:
                    break
                self.results.put((result,))
        except Exception as error:  # a library may raise anything over what a broken server sends
            failure = TierError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        return None


class Lane(Generic[T]):
    """Runs one job at a time. `each` and `close` are called on one thread."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job[T] | None] = SimpleQueue()
        self._is_idle = threading.Event()
        self._is_idle.set()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def each(self, task: Callable[[], Iterable[T]], timeout_s: float) -> Iterator[T]:
        """What the task yields. TierError when it fails or lets one result wait for longer than that."""
        if not self._is_idle.is_set():
            raise TierError("the attempt before this one still hangs")
        self._is_idle.clear()
        job = _Job(task)
        self._jobs.put(job)
        while True:
            try:
                result = job.results.get(timeout=timeout_s)
            except Empty:
                job.is_wanted = False
                raise TierError(f"no answer within {timeout_s * 1e3:.0f} ms") from None
            if result is None:
                return
            if isinstance(result, TierError):
                raise result
            yield result[0]

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            end = job.run()
            self._is_idle.set()  # before whoever asked can ask again
            job.results.put(end)
