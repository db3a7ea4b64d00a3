"""Records in an LMDB file, within a budget of bytes, least recently used out first and fair between tenants.

Several processes may have the file open: each write is one transaction, readers see the last one and wait
for nobody. Knows nothing about what a record holds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import lmdb
from lmdb.verify import VerifyError, verify

from mmserve.encoders.tiers.base import Stored, TierError
from mmserve.encoders.tiers.ledger import TABLES, Tables, check, disk_bytes, ledger, turn
from mmserve.errors import ConfigError

logger = logging.getLogger(__name__)
_DATA: Final = "data.mdb"
_FILES: Final = (_DATA, "lock.mdb")
_OWNERS: Final = "owners"  # locked by every process that has the file open
_STEP_SHARE: Final = 32  # this part of the budget is written, and freed, at a time
_TRIES: Final = 4


class DiskTier:
    """An LMDB environment in `directory`. The sum of its records stays within `max_bytes`, the file within
    a tenth more.

    Opening it alone, a process checks the file's structure and starts anew where it is broken or too large.
    """

    name = "disk"

    def __init__(
        self, directory: Path, max_bytes: int, *, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._used_bytes = self._evicted = 0
        self._touched: dict[bytes, int] = {}
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owners = os.open(directory / _OWNERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                "Expected a writable directory for the embedding cache, but it is not"
            ) from error
        try:
            self._env, self._tables = _open_shared(directory, max_bytes * 11 // 10, self._owners)
            with ledger(self._env, self._tables) as changes:
                self._used_bytes = changes.used_bytes
        except (OSError, lmdb.Error, TierError) as error:
            os.close(self._owners)
            raise ConfigError(f"Expected a usable embedding cache on disk, but: {error}") from error

    def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        try:
            with self._env.begin(db=self._tables.records) as txn:
                found = {name: record for name in addresses if (record := txn.get(name)) is not None}
        except lmdb.Error as error:
            raise TierError(str(error)) from error
        now_ns = self._clock_ns()
        with self._lock:
            self._touched.update(dict.fromkeys(found, now_ns))
        return found

    def put_many(self, records: Mapping[bytes, Stored]) -> None:
        try:
            for part in _parts(records, self._max_bytes // _STEP_SHARE):
                self._put(part)
        except lmdb.Error as error:
            raise TierError(str(error)) from error

    def discard(self, addresses: Collection[bytes]) -> None:
        try:
            with ledger(self._env, self._tables) as changes:
                for name in addresses:
                    changes.remove(name)
                self._used_bytes = changes.used_bytes
        except lmdb.Error as error:
            raise TierError(str(error)) from error

    def used_bytes(self) -> int:
        return self._used_bytes

    def evicted(self) -> int:
        return self._evicted

    def close(self) -> None:
        try:
            self._make_room(0, 0)
        except (lmdb.Error, TierError) as error:
            logger.warning("the embedding cache on disk forgot what was used last: %s", error)
        self._env.close()
        os.close(self._owners)

    def _put(self, records: Mapping[bytes, Stored]) -> None:
        needed = sum(disk_bytes(stored.record) for stored in records.values())
        if needed > self._max_bytes:  # a part is more than one record only where it is small
            return
        step = self._max_bytes // _STEP_SHARE
        self._make_room(needed, step)
        for attempt in range(1, _TRIES + 1):
            try:
                with ledger(self._env, self._tables) as changes:
                    now_ns = self._clock_ns()
                    for name, stored in records.items():
                        changes.add(name, stored, now_ns)
                    self._used_bytes = changes.used_bytes
                return
            except lmdb.MapFullError:
                # free pages lie scattered, or other processes took them
                self._make_room(needed, step * 2**attempt, is_short=True)
        raise TierError("there is no room left in the file")

    def _make_room(self, needed: int, more: int, *, is_short: bool = False) -> None:
        """Write down what was read; where there is no room, or pages are short, evict for so much more."""
        with self._lock:
            touched, self._touched = self._touched, {}
        with ledger(self._env, self._tables) as changes:
            for name, at_ns in touched.items():
                changes.touch(name, at_ns)
            evicts = is_short or changes.used_bytes + needed > self._max_bytes
            if evicts:
                evicted = changes.shrink_to(max(self._max_bytes - needed - more, 0))
            self._used_bytes = changes.used_bytes
        if evicts:
            self._evicted += evicted
            turn(self._env, self._tables)


def _parts(records: Mapping[bytes, Stored], max_bytes: int) -> Iterator[dict[bytes, Stored]]:
    """In order, as many at a time as fit; one that does not fit goes alone."""
    part: dict[bytes, Stored] = {}
    num_bytes = 0
    for name, stored in records.items():
        size = disk_bytes(stored.record)
        if part and num_bytes + size > max_bytes:
            yield part
            part, num_bytes = {}, 0
        part[name] = stored
        num_bytes += size
    if part:
        yield part


def _open_shared(directory: Path, map_bytes: int, owners: int) -> tuple[lmdb.Environment, Tables]:
    try:
        fcntl.flock(owners, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # waits only for one who is checking it
        fcntl.flock(owners, fcntl.LOCK_SH)
        return _open(directory, map_bytes)
    try:
        opened = _open_alone(directory, map_bytes)
    except (TierError, lmdb.Error) as error:
        logger.warning("the embedding cache on disk starts anew: %s", error)
        for name in _FILES:
            (directory / name).unlink(missing_ok=True)
        opened = _open(directory, map_bytes)
    fcntl.flock(owners, fcntl.LOCK_SH)
    return opened


def _open(directory: Path, map_bytes: int) -> tuple[lmdb.Environment, Tables]:
    env = lmdb.open(
        str(directory),
        map_size=map_bytes,
        max_dbs=len(TABLES),
        mode=0o700,
        metasync=False,  # a crash of the machine may undo the last transaction, nothing more
        readahead=False,
    )
    try:
        env.reader_check()
        return env, Tables(*(env.open_db(name) for name in TABLES))
    except BaseException:
        env.close()
        raise


def _open_alone(directory: Path, map_bytes: int) -> tuple[lmdb.Environment, Tables]:
    """Open a file that nobody else has open. TierError when it is not to be used."""
    data = directory / _DATA
    if data.exists():
        _check_structure(data, map_bytes)
    env, tables = _open(directory, map_bytes)
    try:
        # reading what is cut off the last record would end the process; zeros are just no record
        whole = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if data.stat().st_size < whole:
            os.truncate(data, whole)
        check(env, tables)
    except BaseException:
        env.close()
        raise
    return env, tables


def _check_structure(data: Path, map_bytes: int) -> None:
    if data.stat().st_size > map_bytes:
        raise TierError("it is larger than it may be")
    try:
        found = verify(str(data), subdir=False)
    except VerifyError as error:
        raise TierError(str(error)) from error
    if found:
        raise TierError(f"its structure is broken: {found[0]}")
