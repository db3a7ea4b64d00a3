"""Who uses how much of the disk tier, and since when: one write transaction's view of its tables.

Invariant: each record has one note, each note one age, and a tenant's share is the sum of its notes' bytes.
Knows nothing about files, threads or what a record holds.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias

import lmdb

from mmserve.encoders.tiers.base import Stored, TierError

TABLES: Final = (b"records", b"notes", b"ages", b"shares")
_PAGE: Final = 4096
_NOTE: Final = struct.Struct(">8sQQ")
_NUMBER: Final = struct.Struct(">Q")
_TENANT_BYTES: Final = 8
_AGE_BYTES: Final = _TENANT_BYTES + _NUMBER.size

Table: TypeAlias = "lmdb._Database"
Transaction: TypeAlias = "lmdb.Transaction[bytes]"


class Tables(NamedTuple):
    records: Table  # address -> record
    notes: Table  # address -> note
    ages: Table  # tenant, time of last use, address -> nothing: each tenant's oldest comes first
    shares: Table  # tenant -> bytes


class _Note(NamedTuple):
    tenant: bytes
    at_ns: int  # time of last use
    size: int  # bytes on disk

    def age(self, address: bytes) -> bytes:
        return self.tenant + _NUMBER.pack(self.at_ns) + address


def disk_bytes(record: bytes) -> int:
    """What a record takes of the file: whole pages, and its place in the tables."""
    return -(-(len(record) + 16) // _PAGE) * _PAGE + 512


class Ledger:
    """Changes within one transaction. TierError where the tables contradict each other."""

    def __init__(self, txn: Transaction, tables: Tables) -> None:
        self._txn = txn
        self._tables = tables
        self._shares = Counter(_shares(txn, tables))

    @property
    def used_bytes(self) -> int:
        return self._shares.total()

    def add(self, address: bytes, stored: Stored, now_ns: int) -> None:
        self.remove(address)
        tenant = blake2b(stored.tenant.encode(), digest_size=_TENANT_BYTES).digest()
        note = _Note(tenant, now_ns, disk_bytes(stored.record))
        self._txn.put(address, stored.record, db=self._tables.records)
        self._write(address, note)
        self._shares[tenant] += note.size

    def touch(self, address: bytes, now_ns: int) -> None:
        note = self._take(address)
        if note is not None:
            self._write(address, note._replace(at_ns=now_ns))

    def remove(self, address: bytes) -> None:
        note = self._take(address)
        if note is None:
            return
        self._txn.delete(address, db=self._tables.records)
        self._shares[note.tenant] -= note.size

    def shrink_to(self, max_bytes: int) -> int:
        """Remove the oldest records of whoever holds most, until the rest fits; returns how many."""
        removed = 0
        while (used_bytes := self.used_bytes) > max_bytes:
            heaviest = self._shares.most_common(1)[0][0]
            with self._txn.cursor(self._tables.ages) as cursor:
                age = cursor.key() if cursor.set_range(heaviest) else b""
            self.remove(age[_AGE_BYTES:])
            if self.used_bytes >= used_bytes:
                raise TierError("its tables contradict each other")
            removed += 1
        return removed

    def write_shares(self) -> None:
        for tenant, share in self._shares.items():
            if share:
                self._txn.put(tenant, _NUMBER.pack(share), db=self._tables.shares)
            else:
                self._txn.delete(tenant, db=self._tables.shares)

    def _take(self, address: bytes) -> _Note | None:
        """The record's note, no longer in the tables."""
        found = self._txn.pop(address, db=self._tables.notes) if address else None
        if found is None:
            return None
        note = _note(found)
        if (
            not self._txn.delete(note.age(address), db=self._tables.ages)
            or self._shares[note.tenant] < note.size
        ):
            raise TierError("its tables contradict each other")
        return note

    def _write(self, address: bytes, note: _Note) -> None:
        self._txn.put(address, _NOTE.pack(*note), db=self._tables.notes)
        self._txn.put(note.age(address), b"", db=self._tables.ages)


@contextmanager
def ledger(env: lmdb.Environment, tables: Tables) -> Iterator[Ledger]:
    """One write transaction: all of its changes are made, or after an error none."""
    with env.begin(write=True) as txn:
        changes = Ledger(txn, tables)
        yield changes
        changes.write_shares()


def turn(env: lmdb.Environment, tables: Tables) -> None:
    """Commit a transaction that changes nothing: freed pages serve only the next but one."""
    with env.begin(write=True, db=tables.shares) as txn:
        txn.put(b"turn", b"")
        txn.delete(b"turn")


def check(env: lmdb.Environment, tables: Tables) -> None:
    """TierError unless the invariant holds."""
    shares: Counter[bytes] = Counter()
    with env.begin() as txn:
        counts = {txn.stat(db=table)["entries"] for table in tables[:3]}
        records = txn.cursor(tables.records)
        for address, found in txn.cursor(tables.notes):
            note = _note(found)
            shares[note.tenant] += note.size
            if not records.set_key(address) or txn.get(note.age(address), db=tables.ages) is None:
                raise TierError("a record, its note and its age do not belong together")
        if len(counts) > 1 or shares != _shares(txn, tables):
            raise TierError("its tables contradict each other")


def _shares(txn: Transaction, tables: Tables) -> dict[bytes, int]:
    with txn.cursor(tables.shares) as cursor:
        shares = dict(cursor)
    if any(len(tenant) != _TENANT_BYTES or len(share) != _NUMBER.size for tenant, share in shares.items()):
        raise TierError("a share is none")
    return {tenant: _NUMBER.unpack(share)[0] for tenant, share in shares.items()}


def _note(found: bytes) -> _Note:
    if len(found) != _NOTE.size:
        raise TierError("a note is none")
    return _Note(*_NOTE.unpack(found))
