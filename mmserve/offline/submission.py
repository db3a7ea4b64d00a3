"""Requests that a caller waits for together, submitted from a thread of their own.

So an interrupt, which reaches only the caller's thread, never falls into the middle of a request's
start. Knows nothing about what is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from mmserve.generation import Deliver, Generation
from mmserve.offline.runtime import Request
from mmserve.request import Chunk, RequestOutput

MAX_IN_FLIGHT = 64  # requests of one submission that run at the same time


class Submission:
    """At most `MAX_IN_FLIGHT` of `requests` run at a time.

    `outputs` gets their outputs in order or, after all have ended, the first error; it may never end once
    this was cancelled. `on_chunk` and `on_end`, for each request's end, are called on other threads.
    """

    def __init__(
        self,
        submit: Callable[[Request, Deliver], Generation],
        requests: Sequence[Request],
        *,
        on_chunk: Callable[[Chunk], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.outputs: Future[list[RequestOutput]] = Future()
        self.outputs.set_running_or_notify_cancel()
        self._submit = submit
        self._requests = requests
        self._on_chunk = on_chunk
        self._on_end = on_end
        self._results: list[RequestOutput | Exception | None] = [None] * len(requests)
        self._left = len(requests)
        self._running: dict[int, Generation] = {}
        self._places = threading.Semaphore(MAX_IN_FLIGHT)
        self._lock = threading.Lock()  # of what both threads change
        self._is_cancelled = False

    def start(self) -> None:
        if not self._requests:
            self.outputs.set_result([])
            return
        threading.Thread(target=self._run, name="mmserve-submit", daemon=True).start()

    def cancel(self) -> None:
        """End what runs, start nothing more. Returns at once."""
        with self._lock:
            self._is_cancelled = True
            running = tuple(self._running.values())
        self._places.release()  # the thread may wait for one
        for generation in running:
            generation.cancel()

    def _run(self) -> None:
        for place in range(len(self._requests)):
            self._places.acquire()
            if self._is_cancelled:
                return
            self._start(place)

    def _start(self, place: int) -> None:
        try:
            generation = self._submit(self._requests[place], partial(self._take, place))
        except Exception as error:  # raised where the caller waits, whatever it is
            self._take(place, error)
            return
        with self._lock:
            if self._results[place] is None:
                self._running[place] = generation
            is_late = self._is_cancelled
        if is_late:
            generation.cancel()

    def _take(self, place: int, news: Chunk | RequestOutput | Exception) -> None:
        if isinstance(news, Chunk):
            self._on_chunk(news)
            return
        with self._lock:
            self._results[place] = news
            self._running.pop(place, None)
            self._left -= 1
            is_last = self._left == 0
        self._places.release()
        self._on_end()
        if is_last:
            self._end()

    def _end(self) -> None:
        errors = [result for result in self._results if isinstance(result, Exception)]
        if errors:
            self.outputs.set_exception(errors[0])
        else:
            self.outputs.set_result([r for r in self._results if isinstance(r, RequestOutput)])
