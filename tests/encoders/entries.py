"""Entries and keys that the tests of the cache share, and a tier that is a dictionary."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from mmserve.encoders.tiers.base import Stored, TierError
from mmserve.encoders.tiers.record import Entry, RowFormat

WIDTH = 3
ROW_BYTES = 4 * WIDTH + 4  # a token in fp32, and its saliency
ROWS = RowFormat(WIDTH, torch.float32)


def key(name: int) -> bytes:
    return name.to_bytes(4, "big") * 8


def entry(tokens: int, value: float = 0.0) -> Entry:
    return Entry(torch.full((tokens, WIDTH), value), torch.full((tokens,), value))


def same(found: Entry | None, expected: Entry) -> bool:
    return found is not None and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


class FakeTier:
    """Remembers everything; `error` is what it raises."""

    def __init__(self, name: str = "fake") -> None:
        self._name = name
        self.records: dict[bytes, bytes] = {}
        self.tenants: list[str] = []
        self.asked = 0
        self.error: TierError | None = None
        self.is_closed = False

    @property
    def name(self) -> str:
        return self._name

    def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return {name: self.records[name] for name in addresses if name in self.records}

    def put_many(self, records: Mapping[bytes, Stored]) -> None:
        if self.error is not None:
            raise self.error
        self.records |= {name: stored.record for name, stored in records.items()}
        self.tenants += [stored.tenant for stored in records.values()]

    def discard(self, addresses: Collection[bytes]) -> None:
        for name in addresses:
            self.records.pop(name, None)

    def evicted(self) -> None:
        return None

    def used_bytes(self) -> int:
        return sum(map(len, self.records.values()))

    def close(self) -> None:
        self.is_closed = True
