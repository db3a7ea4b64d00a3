"""Files under the SHA-256 of their content, there while somebody holds or keeps them.

Knows nothing about where bytes come from.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmserve.errors import TooLarge
from mmserve.media.budget import ByteBudget


class StoredFile(NamedTuple):
    path: Path
    digest: str


@dataclass(slots=True)
class _Known:
    size: int
    holders: int = 0
    keepers: int = 0


class ContentStore:
    """A directory of content-addressed files. Safe to use from several threads.

    Invariant: a file is there as long as somebody in this process holds or keeps it. All files that are
    held or being written have `max_bytes` together; beyond that comes Overloaded. What is only kept is
    its keeper's to bound.
    """

    def __init__(self, directory: str | Path, max_bytes: int | None = None) -> None:
        self.directory = Path(directory)
        self._budget = ByteBudget(max_bytes, "media")
        self._files: dict[Path, _Known] = {}
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._budget.taken

    def incoming(self, max_bytes: int, expected: int = 0) -> IncomingFile:
        """A file to write; room for `expected` bytes is taken before the first comes."""
        return IncomingFile(self, self._budget, max_bytes, expected)

    def size(self, path: str | Path) -> int:
        """Bytes of a file of this store."""
        with self._lock:
            return self._files[Path(path)].size

    def hold(self, path: str | Path) -> bool:
        """One hold more on a file; False when it is not of this store."""
        with self._lock:
            known = self._files.get(Path(path))
            if known is None:
                return False
            if known.holders == 0:
                self._budget.take(known.size)
            known.holders += 1
            return True

    def release(self, path: str | Path) -> None:
        """Give up one hold; paths that are not of this store are left alone."""
        with self._lock:
            known = self._files.get(Path(path))
            if known is None:
                return
            known.holders -= 1
            if known.holders == 0:
                self._budget.give(known.size)
            self._remove_unused(Path(path), known)

    def keep(self, path: str | Path) -> int | None:
        """Let a held file stay when it is released. Its size, or None when it is not of this store."""
        with self._lock:
            known = self._files.get(Path(path))
            if known is None:
                return None
            known.keepers += 1
            return known.size

    def drop(self, path: str | Path) -> None:
        """Undo one `keep`."""
        with self._lock:
            known = self._files.get(Path(path))
            if known is not None:
                known.keepers -= 1
                self._remove_unused(Path(path), known)

    def _put(self, part: Path, digest: str, size: int, suffix: str) -> StoredFile:
        """Take in a written file, with one hold on it, whose bytes are in the budget."""
        path = self.directory / f"{digest}{suffix}"
        with self._lock:
            part.replace(path)
            known = self._files.setdefault(path, _Known(size))
            if known.holders > 0:
                self._budget.give(size)  # the same content twice counts once
            known.holders += 1
        return StoredFile(path, digest)

    def _remove_unused(self, path: Path, known: _Known) -> None:
        if known.holders == 0 and known.keepers == 0:
            del self._files[path]
            path.unlink(missing_ok=True)


class IncomingFile:
    """A file being written, with its size limited and its digest taken on the way. Use in `with`."""

    def __init__(self, store: ContentStore, budget: ByteBudget, max_bytes: int, expected: int) -> None:
        self._store = store
        self._budget = budget
        self._max_bytes = max_bytes
        self._size = 0
        self._taken = 0  # of the budget
        self._hash = hashlib.sha256()
        self._take(expected)
        self._part = store.directory / f"{secrets.token_hex(16)}.part"
        self._file = open(self._part, "xb")  # noqa: SIM115 - closed by __exit__

    def write(self, data: bytes) -> int:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise TooLarge(f"Expected at most {self._max_bytes} bytes of media, but got more")
        self._take(self._size - self._taken)
        self._hash.update(data)
        return self._file.write(data)

    def finish(self, suffix: str = "") -> StoredFile:
        self._file.close()
        self._budget.give(self._taken - self._size)
        self._taken = self._size
        stored = self._store._put(self._part, self._hash.hexdigest(), self._size, suffix)
        self._taken = 0  # the file's now
        return stored

    def _take(self, size: int) -> None:
        if size > 0:
            self._budget.take(size)
            self._taken += size

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._budget.give(self._taken)
        self._taken = 0
        self._part.unlink(missing_ok=True)
