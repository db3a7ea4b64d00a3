"""In-memory cache of frame embeddings, least recently used out first, bounded by bytes.

Knows nothing about how keys are made or embeddings computed; not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

KEY_BYTES = 32


class Entry(NamedTuple):
    """What the encoder gave for one frame."""

    embeddings: Tensor  # [N, D]
    saliency: Tensor  # [N]

    @property
    def num_bytes(self) -> int:
        return self.embeddings.nbytes + self.saliency.nbytes


class CacheStats(NamedTuple):
    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int


class EmbeddingCache:
    """Frame key -> entry. The sum of all entries' bytes never exceeds `capacity_bytes`; 0 turns it off."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._used_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def get(self, key: bytes) -> Entry | None:
        """The entry, now the most recently used one; callers must not write into it."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        """Store a copy of its own, unless it is larger than the whole cache."""
        assert len(key) == KEY_BYTES, f"a key has {len(key)} bytes"
        old = self._entries.pop(key, None)
        if old is not None:
            self._used_bytes -= old.num_bytes
        if entry.num_bytes > self._capacity_bytes:
            return
        while self._used_bytes + entry.num_bytes > self._capacity_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._used_bytes -= evicted.num_bytes
            self._evictions += 1
        # a row of a batch would keep the whole batch's memory alive
        self._entries[key] = Entry(entry.embeddings.clone(), entry.saliency.clone())
        self._used_bytes += entry.num_bytes

    def stats(self) -> CacheStats:
        return CacheStats(
            entries=len(self._entries),
            used_bytes=self._used_bytes,
            capacity_bytes=self._capacity_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )
