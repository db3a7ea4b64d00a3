"""The loop of a worker process: read commands, let handlers take steps, send events and heartbeats.

Knows nothing about what the handlers do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mmserve import messages as m
from mmserve.errors import MMServeError, WireError
from mmserve.queues import Dealer
from mmserve.transfer import LeaseUnreadable
from mmserve.wire import Codec

logger = logging.getLogger(__name__)
IDLE_POLL_S = 0.2
HEARTBEAT_S = 1.0

COMMANDS: Codec[m.Downward] = Codec(m.Downward)
EVENTS: Codec[m.Upward] = Codec(m.Upward)


class Reporter(Protocol):
    """How a handler speaks to the dispatcher."""

    def emit(self, event: m.AnyEvent) -> None: ...

    def announce(self, requests: tuple[str, ...], bound_s: float) -> None:
        """Say who is in the step that starts now and for how long it may stay silent."""


class Handler(Protocol):
    """One role's work. `handle` only takes note; `step` does a bounded piece and says if more waits."""

    @property
    def roles(self) -> tuple[m.Role, ...]: ...

    @property
    def capacity(self) -> m.Credits: ...

    def credits(self) -> m.Credits: ...

    def handle(self, command: m.AnyCommand) -> None: ...

    def step(self) -> bool: ...


class WorkerLoop:
    """Runs handlers on one thread; colocated roles are several handlers on one loop."""

    def __init__(self, dealer: Dealer, weights_revision: str, pid: int) -> None:
        self._dealer = dealer
        self._weights_revision = weights_revision
        self._pid = pid
        self._handlers: Sequence[Handler] = ()
        self._epoch = ""
        self._seen = 0
        self._announced: tuple[str, ...] = ()
        self._sent_at = 0.0
        self._tidied_at = time.monotonic()

    def emit(self, event: m.AnyEvent) -> None:
        upward = m.Upward(epoch=self._epoch, seen=self._seen, credits=self._credits(), event=event)
        self._dealer.send(EVENTS.encode(upward))
        self._sent_at = time.monotonic()

    def announce(self, requests: tuple[str, ...], bound_s: float) -> None:
        if requests != self._announced:
            self._announced = requests
            self.emit(m.StepStarted(requests=requests, bound_s=bound_s))

    def run(
        self, handlers: Sequence[Handler], should_stop: Callable[[], bool], tidy: Callable[[], object]
    ) -> None:
        """Serve until `should_stop`; `tidy` is called about once a second."""
        self._handlers = handlers
        capacity = _shared([handler.capacity for handler in handlers])
        roles = tuple(role for handler in handlers for role in handler.roles)
        self.emit(
            m.WorkerReady(
                roles=roles, pid=self._pid, weights_revision=self._weights_revision, capacity=capacity
            )
        )
        busy = False
        while not should_stop():
            for frame in self._dealer.poll(0.0 if busy else IDLE_POLL_S):
                self._receive(frame)
            steps = [handler.step() for handler in handlers]  # each gets its turn
            busy = any(steps)
            if not busy:
                self.announce((), 0.0)
            if time.monotonic() - self._sent_at >= HEARTBEAT_S:
                self.emit(m.Heartbeat())
            # by its own clock: a busy worker sends no heartbeats
            if time.monotonic() - self._tidied_at >= HEARTBEAT_S:
                self._tidied_at = time.monotonic()
                tidy()

    def _credits(self) -> m.Credits:
        return _shared([handler.credits() for handler in self._handlers])

    def _receive(self, frame: bytes) -> None:
        try:
            downward = COMMANDS.decode(frame)
        except WireError as error:
            logger.warning("dropped a frame: %s", error)
            return
        if self._epoch not in ("", downward.epoch):
            logger.warning("dropped a command of another dispatcher's epoch")
            return
        self._epoch, self._seen = downward.epoch, max(self._seen, downward.number)
        for handler in self._handlers:
            handler.handle(downward.command)


def _shared(credits: Sequence[m.Credits]) -> m.Credits:
    """Colocated handlers share one connection: the scarcer places, the language model's slots."""
    return m.Credits(
        requests=min(credit.requests for credit in credits), slots=max(credit.slots for credit in credits)
    )


def failed(request_id: str, attempt: int, error: Exception, what: str) -> m.RequestFailed | m.LeaseLost:
    """The event for a request that cannot go on, or not before what it waited for is made again.

    Unexpected errors are logged here, not told to clients.
    """
    if isinstance(error, LeaseUnreadable):
        return m.LeaseLost(request_id=request_id, attempt=attempt, lease_id=error.lease_id)
    if not isinstance(error, MMServeError):
        logger.error("request %s: %s failed", request_id, what, exc_info=error)
        error = MMServeError(f"The server could not finish this request: {what} failed")
    return m.RequestFailed(
        request_id=request_id, attempt=attempt, code=error.code, public_message=error.public_message
    )
