"""Writes that wait for nobody: entries for the slower tiers, encoded and stored on a thread of its own.

The queue is bounded; what does not fit is dropped and counted, since a cache may forget. Knows nothing
about which entries are worth storing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from mmserve.encoders.tiers.base import Breaker, Stored, Tier, TierError
from mmserve.encoders.tiers.record import Entry, encode
from mmserve.encoders.tiers.storage import Storage

logger = logging.getLogger(__name__)
MAX_WAITING_BYTES: Final = 128 << 20
MAX_WAITING: Final = 8192
BATCH_BYTES: Final = 16 << 20


class Write(NamedTuple):
    """One thing to do in some tiers: store an entry or its record, or with neither, remove what is there."""

    tiers: tuple[Tier, ...]
    address: bytes
    key: bytes
    content: Entry | bytes | None = None
    tenant: str = ""

    @property
    def num_bytes(self) -> int:
        if isinstance(self.content, Entry):
            return self.content.num_bytes
        return 0 if self.content is None else len(self.content)


class WriteBehind:
    """Does its writes in order, in batches. `submit` never waits; every method may be called on any thread.

    `stored` and `dropped` count records by the name of the tier.
    """

    def __init__(
        self, tiers: Sequence[Tier], storage: Storage, *, max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self.stored: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._tiers = tuple(tiers)
        self._storage = storage
        self._max_waiting_bytes = max_waiting_bytes
        self._breakers = {
            tier.name: Breaker(f"writing to the embedding cache's {tier.name} tier") for tier in tiers
        }
        self._waiting: deque[Write] = deque()
        self._waiting_bytes = 0  # of what is being written, too
        self._busy = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="embedding-cache", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> None:
        with self._changed:
            full = self._waiting_bytes + write.num_bytes > self._max_waiting_bytes
            if full or self._closing or len(self._waiting) >= MAX_WAITING:
                self._drop(write)
                return
            self._waiting.append(write)
            self._waiting_bytes += write.num_bytes
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted is done; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take no more, do what waits and end; False when that takes longer and the thread still runs."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        done = self.flush(timeout_s)
        with self._changed:
            for write in self._waiting:
                self._drop(write)
            self._waiting.clear()
        return done

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._write(batch)
            except Exception:  # a write that cannot be done must not end those after it
                logger.exception("writing to the embedding cache failed")
            with self._changed:
                self._busy = False
                self._waiting_bytes -= sum(write.num_bytes for write in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[Write]:
        """What waits, up to a batch's bytes; nothing when there will be no more."""
        batch: list[Write] = []
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            num_bytes = 0
            while self._waiting and num_bytes < BATCH_BYTES:
                batch.append(self._waiting.popleft())
                num_bytes += batch[-1].num_bytes
            self._busy = bool(batch)
        return batch

    def _write(self, batch: Sequence[Write]) -> None:
        puts: dict[str, dict[bytes, Stored]] = {tier.name: {} for tier in self._tiers}
        discards: dict[str, set[bytes]] = {tier.name: set() for tier in self._tiers}
        for write in batch:
            names = [tier.name for tier in write.tiers if not self._breakers[tier.name].is_open]
            self.dropped.update(tier.name for tier in write.tiers if tier.name not in names)
            content = write.content
            if isinstance(content, Entry) and names:
                content = encode(write.key, content, self._storage)
            for name in names:
                # the later write to one address wins
                puts[name].pop(write.address, None)
                discards[name].discard(write.address)
                if isinstance(content, bytes):
                    puts[name][write.address] = Stored(content, write.tenant)
                else:
                    discards[name].add(write.address)
        for tier in self._tiers:
            gone, new = discards[tier.name], puts[tier.name]
            if gone:
                self._ask(tier, partial(tier.discard, gone))
            if new:
                done = self._ask(tier, partial(tier.put_many, new))
                (self.stored if done else self.dropped)[tier.name] += len(new)

    def _ask(self, tier: Tier, task: Callable[[], None]) -> bool:
        breaker = self._breakers[tier.name]
        try:
            task()
        except TierError as error:
            breaker.note_failure(error)
            return False
        breaker.note_success()
        return True

    def _drop(self, write: Write) -> None:
        self.dropped.update(tier.name for tier in write.tiers)
