"""Bulk arrays between processes: files of a private directory, which a reader on the same host maps.

The owner publishes arrays and keeps the file until the reader is done or the lease expires. A file
is a preamble (magic, the lease's id and checksum, its size) and the arrays side by side. Readers on
other hosts are frames.py's. Knows nothing about messages in flight, requests or torch.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import shutil
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np

from mmserve.errors import Overloaded, Unavailable, WireError
from mmserve.lease import ArrayHeader, Lease
from mmserve.wire import (
    MAX_ARRAY_BYTES,
    Array,
    TypedArray,
    array_from,
    check_layout,
    checked_bytes,
    lay_out,
    typed,
)

LEASE_TTL_S: Final = 86_400.0  # whoever tracks leases releases them; this is for those it forgets
_MAGIC: Final = b"MMSLEASE"
_PREAMBLE: Final = struct.Struct("<8s16sIIQII")  # magic, id, version, checksum, size, has crc, crc
_VERSION: Final = 1
_DATA_START: Final = 64
_LEASE_ID: Final = re.compile(r"[0-9a-f]{32}")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# what a preferred directory keeps free for others: an eighth, at most this
_MAX_RESERVE_BYTES: Final = 256 << 20


class LeaseGone(WireError):
    """The file was released, expired, or vanished with its owner: the work must be done again."""


class LeaseUnreadable(WireError):
    """It is gone, or not what it claims to be: what it held must be made again."""

    def __init__(self, lease_id: str) -> None:
        super().__init__("Expected a lease that can be read, but it is gone or broken")
        self.lease_id = lease_id


class LeaseReader(Protocol):
    """How a worker reads what others have published."""

    def open(self, lease: Lease, names: Collection[str] | None = None) -> dict[str, Array]:
        """All arrays, or those of these names, read-only; raises nothing but LeaseUnreadable.

        A lease with a crc is checked against it when all is read.
        """


class _Held(NamedTuple):
    path: Path
    total_bytes: int
    owner: str
    expires_at: float


class LeaseStore:
    """Publishes arrays and owns their files until release, expiry or `close`.

    `directories` are tried in order; a full one is passed over. `endpoint` is where the owner answers
    for its leases, if anywhere. Times are those of `clock`, in seconds. Every method may be called
    from any thread. Invariant: each file in the store's own directories belongs to a held lease or to
    a `publish` in progress.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        ttl_s: float = LEASE_TTL_S,
        endpoint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        name = f"leases-{os.getpid()}-{secrets.token_hex(4)}"
        self._directories = tuple(directory / name for directory in directories)
        for directory in self._directories:
            directory.mkdir(mode=0o700)
        self._ttl_s = ttl_s
        self._endpoint = endpoint
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def bytes_held(self) -> int:
        with self._lock:
            return sum(held.total_bytes for held in self._held.values())

    @property
    def num_held(self) -> int:
        return len(self._held)

    def publish(
        self,
        arrays: Mapping[str, Array | TypedArray],
        *,
        ttl_s: float | None = None,
        owner: str = "",
        with_crc: bool = False,
    ) -> Lease:
        """Write the arrays to a file for a reader. `owner` names who is charged for it.

        `ttl_s` is the store's when it is not given. `with_crc` adds a checksum over all bytes; what is
        read over a socket has one anyway.
        """
        with_crc = with_crc or bool(self._endpoint)
        values = {name: typed(array) for name, array in arrays.items()}
        layout = lay_out(values, _DATA_START)
        lease_id = secrets.token_hex(16)
        checksum = _checksum(lease_id, layout.total_bytes, layout.headers)
        parts = [
            np.ascontiguousarray(value.array).reshape(-1).view(np.uint8).data for value in values.values()
        ]
        crc = 0
        if with_crc:
            for part in parts:
                crc = zlib.crc32(part, crc)
        preamble = _PREAMBLE.pack(
            _MAGIC, bytes.fromhex(lease_id), _VERSION, checksum, layout.total_bytes, int(with_crc), crc
        )
        chunks = [(0, memoryview(preamble))]
        chunks += [(header.offset, part) for header, part in zip(layout.headers, parts, strict=True)]
        path = self._write(f"{lease_id}.lease", chunks, layout.total_bytes)
        lease = Lease(
            lease_id=lease_id,
            path=str(path),
            total_bytes=layout.total_bytes,
            arrays=layout.headers,
            checksum=checksum,
            crc=crc if with_crc else None,
            endpoint=self._endpoint,
        )
        expires_at = self._clock() + (self._ttl_s if ttl_s is None else ttl_s)
        self._keep(lease_id, _Held(path, layout.total_bytes, owner, expires_at))
        return lease

    def read(self, lease_id: str, offset: int, num_bytes: int) -> bytes:
        """Some bytes of a held file, for a reader that cannot map it; raises WireError."""
        with self._lock:
            held = self._held.get(lease_id)
        if held is None:
            raise LeaseGone("Expected a live lease, but it is not held")
        if not (offset >= 0 and 0 < num_bytes <= held.total_bytes - offset):
            raise WireError("Expected a piece inside the lease's file, but it is not")
        try:
            descriptor = os.open(held.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise LeaseGone("Expected a live lease, but its file is gone") from error
        try:
            data = os.pread(descriptor, num_bytes, offset)
        finally:
            os.close(descriptor)
        if len(data) != num_bytes:
            raise WireError("Expected a whole file behind a lease, but it is shorter")
        return data

    def renew(self, lease_id: str, ttl_s: float) -> bool:
        """Let a lease expire `ttl_s` from now; False when it is not held."""
        with self._lock:
            held = self._held.get(lease_id)
            if held is not None:
                self._held[lease_id] = held._replace(expires_at=self._clock() + ttl_s)
            return held is not None

    def release(self, lease_id: str) -> bool:
        """The reader has mapped or no longer wants the file; False when it is not held."""
        return bool(self._drop(lambda key, _: key == lease_id))

    def release_owner(self, owner: str) -> list[str]:
        """Release every lease charged to one owner, such as a cancelled request."""
        return self._drop(lambda _, held: held.owner == owner)

    def sweep(self, now: float | None = None) -> list[str]:
        """Release what has expired; returns the lease ids."""
        at = self._clock() if now is None else now
        return self._drop(lambda _, held: held.expires_at <= at)

    def close(self) -> None:
        """Release everything and remove the store's directories; nothing can be published after."""
        with self._lock:
            self._closed = True
        self._drop(lambda _, held: True)
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> LeaseStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _keep(self, lease_id: str, held: _Held) -> None:
        with self._lock:
            if not self._closed:
                self._held[lease_id] = held
                return
        held.path.unlink(missing_ok=True)
        raise Unavailable("The worker is shutting down and transfers nothing")

    def _drop(self, chosen: Callable[[str, _Held], bool]) -> list[str]:
        with self._lock:
            dropped = {key: held for key, held in self._held.items() if chosen(key, held)}
            for key in dropped:
                del self._held[key]
        for held in dropped.values():
            held.path.unlink(missing_ok=True)
        return list(dropped)

    def _write(self, name: str, chunks: Iterable[tuple[int, memoryview]], total_bytes: int) -> Path:
        for directory in self._directories:
            is_last = directory == self._directories[-1]
            try:
                if not is_last and not _has_room(directory, total_bytes):
                    continue
                return _write_file(directory / name, chunks, total_bytes)
            except OSError as error:
                if self._closed:
                    raise Unavailable("The worker is shutting down and transfers nothing") from error
                if error.errno not in _FULL:
                    raise
        raise Overloaded(f"There is no room to transfer {total_bytes} bytes")


class MappedLeases:
    """Reads leases whose files lie under these directories."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories

    def open(self, lease: Lease, names: Collection[str] | None = None) -> dict[str, Array]:
        try:
            arrays = open_lease(lease, self._directories, verify=lease.crc is not None and names is None)
        except WireError as error:
            raise LeaseUnreadable(lease.lease_id) from error
        return arrays if names is None else {name: arrays[name] for name in names if name in arrays}


def check_lease(lease: Lease, max_bytes: int = MAX_ARRAY_BYTES) -> None:
    """Raise WireError unless its headers are whole, and arrays can lie in a file as they say."""
    if lease.checksum != _checksum(lease.lease_id, lease.total_bytes, lease.arrays):
        raise WireError("Expected a lease whose checksum fits, but it does not")
    check_layout(lease.arrays, lease.total_bytes, _DATA_START, max_bytes)


def open_lease(
    lease: Lease, allowed: Sequence[Path], *, max_bytes: int = MAX_ARRAY_BYTES, verify: bool = False
) -> dict[str, Array]:
    """Map a lease's arrays, read-only; they stay readable after the owner releases the file.

    The file must lie in a store under one of the `allowed` directories. `verify` reads every byte
    and compares the checksum that `publish(with_crc=True)` left. Raises WireError, and its
    subclass LeaseGone when there is no such file.
    """
    check_lease(lease, max_bytes)
    descriptor = _open_file(lease, allowed)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise WireError("Expected a lease's file to be a regular file of ours, but it is not")
        if info.st_size != lease.total_bytes:
            raise WireError(f"Expected a file of {lease.total_bytes} bytes, but it has {info.st_size}")
        # private copy-on-write pages: torch may take them without a warning, nobody sees a write
        mapped = mmap.mmap(descriptor, lease.total_bytes, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    view = memoryview(mapped)
    spans = [(header, view[header.offset : header.offset + checked_bytes(header)]) for header in lease.arrays]
    _check_preamble(lease, view, [span for _, span in spans], verify)
    return {header.name: array_from(header, span, max_bytes) for header, span in spans}


def unlink_lease(lease: Lease, allowed: Sequence[Path]) -> bool:
    """Remove the file of a lease whose owner cannot; False when it is gone. Checks as `open_lease`."""
    try:
        _lease_path(lease, allowed).unlink()
    except FileNotFoundError:
        return False
    return True


def remove_leases_of(pid: int, directories: Sequence[Path]) -> None:
    """Remove what a dead process left in the shared directories."""
    for directory in directories:
        for left in directory.glob(f"leases-{pid}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _checksum(lease_id: str, total_bytes: int, headers: Sequence[ArrayHeader]) -> int:
    try:
        return zlib.crc32(msgspec.msgpack.encode((lease_id, total_bytes, headers)))
    except (OverflowError, UnicodeEncodeError) as error:
        raise WireError("Expected array headers in range, but a number is not") from error


def _has_room(directory: Path, total_bytes: int) -> bool:
    usage = shutil.disk_usage(directory)
    return usage.free - total_bytes >= min(_MAX_RESERVE_BYTES, usage.total // 8)


def _write_file(path: Path, chunks: Iterable[tuple[int, memoryview]], total_bytes: int) -> Path:
    """Write under another name, then rename, so that a reader sees all of it or nothing."""
    unfinished = path.with_suffix(".part")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # a full file system is reported here, not by a signal while a reader touches a page
        os.posix_fallocate(descriptor, 0, total_bytes)
        for offset, chunk in chunks:
            while chunk:
                written = os.pwrite(descriptor, chunk, offset)
                offset, chunk = offset + written, chunk[written:]
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return path


def _lease_path(lease: Lease, allowed: Sequence[Path]) -> Path:
    if _LEASE_ID.fullmatch(lease.lease_id) is None:
        raise WireError("Expected a lease id of 32 hexadecimal digits, but got another")
    directory, name = os.path.split(lease.path)
    if "\0" in lease.path or not os.path.isabs(directory) or name != f"{lease.lease_id}.lease":
        raise WireError("Expected an absolute path that ends in the lease's id, but got another")
    real = Path(os.path.realpath(directory))
    if not any(real.parent == Path(os.path.realpath(root)) for root in allowed):
        raise WireError("Expected a lease inside the run directory, but its path leads elsewhere")
    return real / name


def _open_file(lease: Lease, allowed: Sequence[Path]) -> int:
    path = _lease_path(lease, allowed)
    try:
        # never wait for a pipe, never follow a link
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise LeaseGone("Expected a live lease, but its file is gone") from error
    except (OSError, ValueError) as error:
        raise WireError("Expected a readable lease, but its file cannot be opened") from error


def _check_preamble(lease: Lease, view: memoryview, spans: Sequence[memoryview], verify: bool) -> None:
    magic, file_id, version, checksum, size, has_crc, crc = _PREAMBLE.unpack_from(view)
    if (magic, version) != (_MAGIC, _VERSION):
        raise WireError("Expected a lease file of this version, but it is not")
    if (file_id, checksum, size) != (bytes.fromhex(lease.lease_id), lease.checksum, lease.total_bytes):
        raise WireError("Expected the file to repeat the lease's id, checksum and size, but it differs")
    if verify:
        actual = 0
        for span in spans:
            actual = zlib.crc32(span, actual)
        if has_crc != 1 or actual != crc:
            raise WireError("Expected array bytes that match their checksum, but they do not")
