"""The cache of frame embeddings: a worker's own memory in front, slower and larger tiers behind it.

Knows nothing about how keys are made or embeddings computed. Called on one thread; writes to the slower
tiers happen on another.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mmserve.encoders.tiers.base import Breaker, Tier, TierError
from mmserve.encoders.tiers.behind import Write, WriteBehind
from mmserve.encoders.tiers.memory import EntryMemory
from mmserve.encoders.tiers.record import Entry, RowFormat, address, decode
from mmserve.encoders.tiers.storage import Storage
from mmserve.errors import WireError

logger = logging.getLogger(__name__)
KEY_BYTES: Final = 32
CLOSE_S: Final = 2.0  # what waits to be written then may be lost


class TierStats(NamedTuple):
    """Records, counted since the start; `hits` are what no tier before this one had."""

    name: str
    hits: int
    corrupt: int  # found, but broken or another's: counted as misses too
    failures: int  # times it could not be read
    stored: int
    dropped: int  # not stored: too much waited, or it could not be written
    used_bytes: int | None
    evicted: int | None = None


class CacheStats(NamedTuple):
    """The worker's own memory, and hits and misses over all tiers."""

    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int
    tiers: tuple[TierStats, ...] = ()


class EmbeddingCache:
    """Frame key -> entry. Callers must not write into what they get or gave.

    Memory holds at most `capacity_bytes`, 0 for none; `host_bytes` of pinned memory back a GPU's. `tiers`
    come fastest first and need `rows`, what an entry must be; with a `storage` other than raw they give back
    numbers within its error bound. Whatever a tier does, the worst answer is a miss.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        tiers: Sequence[Tier] = (),
        rows: RowFormat | None = None,
        storage: Storage = "raw",
        device: torch.device | str = "cpu",
        host_bytes: int = 0,
    ) -> None:
        assert rows is not None or not tiers, "records cannot be judged without a format"
        self._device = torch.device(device)
        self._memory = EntryMemory(capacity_bytes)
        self._host = EntryMemory(host_bytes, cost=_pinned_bytes)
        self._rows = rows
        self._storage: Storage = storage
        self._tiers = tuple(tiers)
        self._breakers = [Breaker(f"reading the embedding cache's {tier.name} tier") for tier in tiers]
        self._behind = WriteBehind(tiers, storage) if tiers else None
        self._misses = 0
        self._hits: Counter[str] = Counter()
        self._corrupt: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def get(self, key: bytes, *, tokens: int | None = None, tenant: str = "") -> Entry | None:
        return self.get_many([key], tokens=tokens, tenant=tenant).get(key)

    def get_many(
        self, keys: Sequence[bytes], *, tokens: int | None = None, tenant: str = ""
    ) -> dict[bytes, Entry]:
        """What is there of the keys, now most recently used. An entry of other than `tokens` is a miss."""
        found: dict[bytes, Entry] = {}
        for key in keys:
            entry = self._memory.get(key)
            name = "memory"
            if entry is None and (pinned := self._host.get(key)) is not None:
                entry, name = self._on_device(pinned), "host"
                self._keep(self._memory, key, entry, tenant)
            if entry is not None and tokens in (None, len(entry.saliency)):
                found[key] = entry
                self._hits[name] += 1
        for index in range(len(self._tiers)):
            missing = [key for key in keys if key not in found]
            if missing:
                found |= self._read(index, missing, tokens, tenant)
        self._misses += sum(key not in found for key in keys)
        return found

    def put(self, key: bytes, entry: Entry, *, tenant: str = "") -> None:
        """Store a copy of its own, at once in memory and soon in every other tier."""
        assert len(key) == KEY_BYTES, f"a key has {len(key)} bytes"
        # a row of a batch would keep the whole batch's memory alive
        copy = Entry(entry.embeddings.clone(), entry.saliency.clone())
        self._keep(self._memory, key, copy, tenant)
        content = self._keep_host(key, copy, tenant) or copy
        self._write(self._tiers, key, content, tenant)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything put is in its tiers; False when that takes longer."""
        return self._behind is None or self._behind.flush(timeout_s)

    def close(self) -> None:
        """Finish what waits to be written, within `CLOSE_S`."""
        if self._behind is not None and not self._behind.close(CLOSE_S):
            logger.warning("the embedding cache was closed before everything in it was written")
            return  # its thread still uses them
        for tier in self._tiers:
            tier.close()

    def stats(self) -> CacheStats:
        memory = self._memory
        return CacheStats(
            entries=len(memory),
            used_bytes=memory.used_bytes,
            capacity_bytes=memory.capacity_bytes,
            hits=self._hits.total(),
            misses=self._misses,
            evictions=memory.evictions,
            tiers=tuple(self._tier_stats(tier) for tier in self._tiers),
        )

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Events since the start and bytes held now, as far as known, by tier: named like "hits/disk"."""
        memories = {"memory": self._memory, "host": self._host}
        memories = {name: memory for name, memory in memories.items() if memory.capacity_bytes}
        totals = {f"evictions/{name}": memory.evictions for name, memory in memories.items()}
        held = {f"bytes/{name}": memory.used_bytes for name, memory in memories.items()}
        for tier in map(self._tier_stats, self._tiers):
            counted = {"corrupt": tier.corrupt, "failures": tier.failures}
            counted |= {"stored": tier.stored, "dropped": tier.dropped}
            if tier.evicted is not None:
                counted["evictions"] = tier.evicted
            totals |= {f"{event}/{tier.name}": count for event, count in counted.items()}
            if tier.used_bytes is not None:
                held[f"bytes/{tier.name}"] = tier.used_bytes
        asked = self._hits.total() + self._misses
        for name in (*memories, *(tier.name for tier in self._tiers)):
            # what a tier misses, the next one is asked
            asked -= self._hits[name]
            totals |= {f"hits/{name}": self._hits[name], f"misses/{name}": asked}
        return totals, held

    def _read(self, index: int, keys: Sequence[bytes], tokens: int | None, tenant: str) -> dict[bytes, Entry]:
        tier, breaker = self._tiers[index], self._breakers[index]
        if breaker.is_open:
            return {}
        try:
            records = tier.get_many([self._address(key) for key in keys])
        except TierError as error:
            breaker.note_failure(error)
            self._failures[tier.name] += 1
            return {}
        breaker.note_success()
        found = {}
        for key in keys:
            record = records.get(self._address(key))
            if record is None:
                continue
            entry = self._judge(tier, key, record, tokens)
            if entry is None:
                continue
            found[key] = entry
            self._hits[tier.name] += 1
            self._keep(self._memory, key, entry, tenant)
            self._keep_host(key, entry, tenant)
            self._write(self._tiers[:index], key, record, tenant)
        return found

    def _judge(self, tier: Tier, key: bytes, record: bytes, tokens: int | None) -> Entry | None:
        """The record's entry; one that is broken or another's leaves the tier."""
        assert self._rows is not None
        try:
            return self._on_device(decode(record, key, self._rows, tokens))
        except WireError as error:
            self._corrupt[tier.name] += 1
            logger.warning("removed a record from the embedding cache's %s tier: %s", tier.name, error)
            self._write((tier,), key, None, tenant="")
            return None

    def _write(self, tiers: tuple[Tier, ...], key: bytes, content: Entry | bytes | None, tenant: str) -> None:
        if self._behind is not None and tiers:
            self._behind.submit(Write(tiers, self._address(key), key, content, tenant))

    def _address(self, key: bytes) -> bytes:
        assert self._rows is not None
        return address(key, self._rows, self._storage)

    def _keep(self, memory: EntryMemory, key: bytes, entry: Entry, tenant: str) -> None:
        if memory.has_room_for(entry):
            memory.put(key, entry, tenant)
        else:
            memory.remove(key)

    def _keep_host(self, key: bytes, entry: Entry, tenant: str) -> Entry | None:
        if not self._host.has_room_for(entry):
            return None
        pinned = Entry(_pinned(entry.embeddings), _pinned(entry.saliency))
        self._host.put(key, pinned, tenant)
        return pinned

    def _on_device(self, entry: Entry) -> Entry:
        return Entry(*(tensor.to(self._device, non_blocking=True) for tensor in entry))

    def _tier_stats(self, tier: Tier) -> TierStats:
        assert self._behind is not None
        return TierStats(
            name=tier.name,
            hits=self._hits[tier.name],
            corrupt=self._corrupt[tier.name],
            failures=self._failures[tier.name],
            stored=self._behind.stored[tier.name],
            dropped=self._behind.dropped[tier.name],
            used_bytes=tier.used_bytes(),
            evicted=tier.evicted(),
        )


def _pinned(tensor: Tensor) -> Tensor:
    pins = torch.cuda.is_available()
    return torch.empty_like(tensor, device="cpu", pin_memory=pins).copy_(tensor)


def _pinned_bytes(entry: Entry) -> int:
    """Pinned memory comes in powers of two."""
    return sum(1 << max(tensor.nbytes - 1, 0).bit_length() for tensor in entry)
