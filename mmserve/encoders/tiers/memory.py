"""Entries held as tensors, least recently used out first, bounded by bytes and fair between tenants.

Knows nothing about how keys are made or embeddings computed; not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from mmserve.encoders.tiers.record import Entry


class EntryMemory:
    """Key -> entry. The sum of what all entries cost never exceeds `capacity_bytes`; 0 stores nothing.

    Room is made by the tenant that would hold most, from its least recently used entry on: who floods the
    memory evicts nobody who holds less.
    """

    def __init__(
        self, capacity_bytes: int, cost: Callable[[Entry], int] = lambda entry: entry.num_bytes
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.evictions = 0
        self._cost = cost
        self._tenants: dict[bytes, str] = {}
        self._entries: dict[str, OrderedDict[bytes, Entry]] = {}
        self._shares: dict[str, int] = {}  # bytes

    def __len__(self) -> int:
        return len(self._tenants)

    def get(self, key: bytes) -> Entry | None:
        """The entry, now the most recently used one of its tenant."""
        tenant = self._tenants.get(key)
        if tenant is None:
            return None
        entries = self._entries[tenant]
        entries.move_to_end(key)
        return entries[key]

    def has_room_for(self, entry: Entry) -> bool:
        return self._cost(entry) <= self.capacity_bytes

    def put(self, key: bytes, entry: Entry, tenant: str) -> None:
        """Keep the entry itself, not a copy; it must fit an empty memory."""
        cost = self._cost(entry)
        assert cost <= self.capacity_bytes
        self.remove(key)
        while self.used_bytes + cost > self.capacity_bytes:
            loads = {name: share + cost * (name == tenant) for name, share in self._shares.items()}
            self.remove(next(iter(self._entries[max(loads, key=loads.__getitem__)])))
            self.evictions += 1
        self._tenants[key] = tenant
        self._entries.setdefault(tenant, OrderedDict())[key] = entry
        self._shares[tenant] = self._shares.get(tenant, 0) + cost
        self.used_bytes += cost

    def remove(self, key: bytes) -> None:
        tenant = self._tenants.pop(key, None)
        if tenant is None:
            return
        entries = self._entries[tenant]
        cost = self._cost(entries.pop(key))
        self.used_bytes -= cost
        self._shares[tenant] -= cost
        if not entries:
            del self._entries[tenant], self._shares[tenant]
