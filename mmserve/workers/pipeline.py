"""The shell around the dispatcher: one thread that owns the router socket and moves messages.

Front doors (API, batch, `LLM`) call it from any thread; news reach them through a callback. Knows
nothing about HTTP or models.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from mmserve import messages as m
from mmserve.errors import MMServeError, TooLarge, Unavailable, WireError
from mmserve.messages import Role
from mmserve.queues import CurveKeys, Router
from mmserve.request import Prompt
from mmserve.transfer import unlink_lease
from mmserve.wire import Codec
from mmserve.workers.dispatcher import Dispatcher, Update

logger = logging.getLogger(__name__)
T = TypeVar("T")
POLL_S = 0.1

COMMANDS: Codec[m.Downward] = Codec(m.Downward)
EVENTS: Codec[m.Upward] = Codec(m.Upward)


class Pipeline:
    """Runs a `Dispatcher` on its own thread and delivers each request's updates to its listener.

    A listener is called on that thread, in order, and must not block; after the update with
    `is_final` it is forgotten.
    """

    def __init__(
        self,
        endpoint: str,
        directories: Sequence[Path],
        *,
        max_active: int,
        deadline_s: float,
        keys: CurveKeys | None = None,
    ) -> None:
        self._router = Router(endpoint, keys)
        self._directories = directories
        self.endpoint = self._router.endpoint
        self._dispatcher = Dispatcher(clock=time.monotonic, max_active=max_active, deadline_s=deadline_s)
        self._listeners: dict[str, Callable[[Update], None]] = {}
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._ready = threading.Condition()
        self._roles: frozenset[Role] = frozenset()
        self._failure: MMServeError | None = None
        self._closing = False
        self._ended = False  # under the lock: no call is taken any more
        self._thread = threading.Thread(target=self._run, name="mmserve-pipeline", daemon=True)
        self._thread.start()

    # front door

    def admit(self, listener: Callable[[Update], None], deadline_s: float | None = None) -> str:
        """Reserve a place and name who hears about it; raises Overloaded."""

        def register() -> str:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise Unavailable("The server is shutting down")
            request_id = self._dispatcher.admit(deadline_s)
            self._listeners[request_id] = listener
            return request_id

        return self._call(register)

    def submit(self, request_id: str, prompt: Prompt, fetch_ms: float = 0.0) -> None:
        self._post(lambda: self._dispatcher.submit(request_id, prompt, fetch_ms))

    def cancel(self, request_id: str) -> None:
        self._post(lambda: self._dispatcher.cancel(request_id))

    def stop(self, request_id: str) -> None:
        self._post(lambda: self._dispatcher.stop(request_id))

    def fail(self, request_id: str, error: MMServeError) -> None:
        self._post(lambda: self._dispatcher.fail(request_id, error))

    def counts(self) -> dict[str, int]:
        """Counters by reason, with gauges of what is active and waiting now."""
        return self._call(
            lambda: (
                self._dispatcher.counts
                | {"active": len(self._dispatcher.records), "waiting": len(self._dispatcher.waiting)}
            )
        )

    def work_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """What the encode workers have done since the start, and what they hold now."""
        return self._call(self._dispatcher.work_counts)

    def worker_pids(self) -> dict[str, int]:
        """Process ids of the live workers by name (role-slot-generation)."""
        return self._call(lambda: {worker.name: worker.pid for worker in self._dispatcher.workers.values()})

    @property
    def is_full(self) -> bool:
        """Whether `admit` would refuse just now; costs nothing to ask."""
        return len(self._dispatcher.records) >= self._dispatcher.max_active

    @property
    def without_token(self) -> int:
        """Requests that wait for their first token, their media being here; costs little to ask."""
        records = list(self._dispatcher.records.values())  # at once: the thread goes on
        return sum(record.prompt is not None and record.first_token_at is None for record in records)

    @property
    def is_ready(self) -> bool:
        return self._roles >= set(Role) and self._failure is None

    def wait_ready(self, timeout_s: float) -> None:
        """Block until every stage has a worker; raises what the supervisor reported, or Unavailable."""
        with self._ready:
            self._ready.wait_for(lambda: self.is_ready or self._failure is not None, timeout_s)
        if self._failure is not None:
            raise self._failure
        if not self.is_ready:
            missing = ", ".join(sorted(set(Role) - self._roles))
            raise Unavailable(
                f"Expected workers for every stage within {timeout_s:.0f} s, but none for {missing}"
            )

    def report_failure(self, error: MMServeError) -> None:
        """A stage is gone for good: whoever waits for it, now or later, gets this error."""
        with self._ready:
            self._failure = error
            self._ready.notify_all()
        self._post(lambda: self._dispatcher.abandon(error))

    def close(self) -> None:
        """End every request, then the thread. Idempotent."""
        if self._closing:
            return
        # first this, so that nothing is admitted behind the last call
        self._closing = True
        self._post(lambda: self._dispatcher.abandon(Unavailable("The server is shutting down")))
        self._thread.join()

    # the thread

    def _post(self, call: Callable[[], None]) -> bool:
        """Have the thread do it; False, and not done, once the thread has ended every request."""
        with self._lock:
            if self._ended:
                return False
            self._calls.append(call)
        self._router.wake()
        return True

    def _call(self, function: Callable[[], T]) -> T:
        if self._closing:
            raise Unavailable("The server is shutting down")
        if threading.current_thread() is self._thread:
            return function()
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # the caller's to handle; this thread goes on
                answer.set_exception(error)

        if not self._post(run):
            raise Unavailable("The server is shutting down")
        return answer.result(timeout=30)

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            for worker, frame in self._router.poll(POLL_S):
                self._guard(partial(self._receive, worker.decode("ascii", "replace"), frame))
            with self._lock:
                calls, self._calls = self._calls, []
            for call in calls:
                self._guard(call)
            if time.monotonic() >= next_tick:
                self._guard(self._dispatcher.tick)
                next_tick = time.monotonic() + POLL_S
            self._flush()
            with self._lock:
                self._ended = self._closing and not self._calls and not calls
            if self._ended:
                break
        self._router.close()

    def _guard(self, call: Callable[[], object]) -> None:
        """One bad frame, call or listener must not end the thread that every request waits for."""
        try:
            call()
        except Exception:
            logger.exception("the pipeline goes on after an unexpected error")

    def _receive(self, worker: str, frame: bytes) -> None:
        try:
            upward = EVENTS.decode(frame)
        except WireError as error:
            logger.warning("dropped a frame from %s: %s", worker, error)
            return
        self._dispatcher.handle(worker, upward)

    def _send(self, worker: str, number: int, command: m.AnyCommand) -> None:
        try:
            frame = COMMANDS.encode(m.Downward(epoch=self._dispatcher.epoch, number=number, command=command))
        except WireError:
            if not isinstance(command, m.CancelRequest | m.ReleaseLease | m.KillWorker):
                error = TooLarge("Expected a shorter prompt, but it does not fit into one message")
                self._dispatcher.fail(command.request_id, error)
            return
        # a peer that is gone is not an error: its death is reported by the supervisor
        self._router.send(worker.encode(), frame)

    def _flush(self) -> None:
        dispatcher = self._dispatcher
        while dispatcher.outbox:
            self._guard(partial(self._send, *dispatcher.outbox.popleft()))
        while dispatcher.orphaned:
            self._guard(partial(unlink_lease, dispatcher.orphaned.popleft(), self._directories))
        while dispatcher.updates:
            update = dispatcher.updates.popleft()
            listener = self._listeners.get(update.request_id)
            if update.is_final:
                self._listeners.pop(update.request_id, None)
            if listener is not None:
                self._guard(partial(listener, update))
        roles = frozenset(dispatcher.ready_roles())
        if roles != self._roles:
            with self._ready:
                self._roles = roles
                self._ready.notify_all()
