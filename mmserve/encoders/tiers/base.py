"""What the embedding cache asks of a slower tier, and the switch that leaves a broken one alone for a while.

Tiers hold records under addresses; only `record` knows what is in a record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

logger = logging.getLogger(__name__)
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class TierError(Exception):
    """A tier could not do what it was asked; its message is for the log."""


class Stored(NamedTuple):
    record: bytes
    tenant: str


class Tier(Protocol):
    """`get_many` is called on one thread, the writes on another. What fails raises TierError."""

    @property
    def name(self) -> str: ...

    def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        """The records that are there; must not take long."""
        ...

    def put_many(self, records: Mapping[bytes, Stored]) -> None: ...

    def discard(self, addresses: Collection[bytes]) -> None: ...

    def used_bytes(self) -> int | None:
        """None where the tier does not know; called on any thread."""
        ...

    def evicted(self) -> int | None:
        """Records that had to go for lack of room; None where the tier does not know."""
        ...

    def close(self) -> None: ...


class Breaker:
    """Closed, it lets everything pass. A failure opens it for a pause that doubles with each further one.

    Says so in the log when it opens and when it closes, never in between. Owned by one thread.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._pause_s = 0.0
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether to leave it alone; after the pause one attempt may be made."""
        return self._pause_s > 0 and self._clock() < self._until

    def note_success(self) -> None:
        if self._pause_s:
            logger.info("%s works again", self._what)
            self._pause_s = 0.0

    def note_failure(self, error: Exception) -> None:
        if not self._pause_s:
            logger.warning("%s is left alone until it works again: %s", self._what, error)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
        self._until = self._clock() + self._pause_s
