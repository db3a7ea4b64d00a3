"""Files under the SHA-256 of their content, kept while somebody holds them.

Knows nothing about where bytes come from.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from mmserve.errors import TooLarge


class StoredFile(NamedTuple):
    path: Path
    digest: str


class ContentStore:
    """A directory of content-addressed files. Safe to use from several threads.

    Invariant: a file is there as long as it has more `put`s than `release`s in this process.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._holders: dict[Path, int] = {}
        self._lock = threading.Lock()

    def incoming(self, max_bytes: int) -> IncomingFile:
        return IncomingFile(self, max_bytes)

    def put(self, part: Path, digest: str, suffix: str = "") -> StoredFile:
        path = self.directory / f"{digest}{suffix}"
        with self._lock:
            part.replace(path)
            self._holders[path] = self._holders.get(path, 0) + 1
        return StoredFile(path, digest)

    def release(self, path: str | Path) -> None:
        """Give up one hold; paths that are not of this store are left alone."""
        held = Path(path)
        with self._lock:
            if held not in self._holders:
                return
            self._holders[held] -= 1
            if self._holders[held] == 0:
                del self._holders[held]
                held.unlink(missing_ok=True)


class IncomingFile:
    """A file being written, with its size limited and its digest taken on the way. Use in `with`."""

    def __init__(self, store: ContentStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._size = 0
        self._hash = hashlib.sha256()
        self._part = store.directory / f"{secrets.token_hex(16)}.part"
        self._file = open(self._part, "xb")  # noqa: SIM115 - closed by __exit__

    def write(self, data: bytes) -> int:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise TooLarge(f"Expected at most {self._max_bytes} bytes of media, but got more")
        self._hash.update(data)
        return self._file.write(data)

    def finish(self, suffix: str = "") -> StoredFile:
        self._file.close()
        return self._store.put(self._part, self._hash.hexdigest(), suffix)

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)
