"""The file of answers: one row per id at every moment, whatever kills the program.

A row is appended with one write and synced; everything else replaces the file atomically. Knows
nothing about how rows are made.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmserve.errors import BadRequest, MMServeError

Json = dict[str, Any]


class AnswerFile:
    """Rows by id, in memory and on disk. One program at a time may hold it; use it as a context manager.

    Opening repairs a last line that was cut off, and drops the rows that `again` picks.
    """

    def __init__(self, path: Path, known: Iterable[str], again: Callable[[Json], bool]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _open_locked(path)
        try:
            content = path.read_bytes()
            self.rows = {row_id: row for row_id, row in _read(content, path.name) if not again(row)}
            if strangers := self.rows.keys() - set(known):
                raise BadRequest(
                    f"Expected {path.name} to answer these questions, but it has a row for {min(strangers)!r}"
                )
            if content != _serialise(self.rows.values()):
                self._replace()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, row: Json) -> None:
        """Add one row; when this returns it survives a power cut."""
        row_id = id_of(row)
        assert row_id not in self.rows, f"two rows for {row_id!r}"
        _write(self._fd, _serialise([row]))
        self.rows[row_id] = row

    def finalise(self, order: Sequence[str]) -> None:
        """Put the rows in the order of these ids."""
        ordered = {row_id: self.rows[row_id] for row_id in order if row_id in self.rows}
        assert ordered.keys() == self.rows.keys()
        if list(ordered) != list(self.rows):
            self.rows = ordered
            self._replace()

    def _replace(self) -> None:
        """Write all rows to a new file and put it in the old one's place; the lock goes with it."""
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(handle, os.fstat(self._fd).st_mode & 0o777)
            _write(handle, _serialise(self.rows.values()))
            os.replace(name, self.path)
        except BaseException:
            os.close(handle)
            Path(name).unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = handle
        _sync_directory(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def id_of(row: Json) -> str:
    """The id of an own row or of an OpenAI line (whose `id` is another)."""
    return str(row["custom_id"] if "custom_id" in row else row["id"])


def _open_locked(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BadRequest(f"Expected a file that can be written, but got {path}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise MMServeError(f"Another program is writing {path.name}") from error
        if os.path.exists(path) and os.stat(path).st_ino == os.fstat(handle).st_ino:
            return handle
        # replaced between opening and locking
        os.close(handle)


def _read(content: bytes, name: str) -> list[tuple[str, Json]]:
    """Rows with their ids; only the last line may be broken, and only where it can be a torn row."""
    lines = [line for line in content.split(b"\n") if line.strip(b"\0 \r")]
    rows: list[tuple[str, Json]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((id_of(row), row))
        except (ValueError, TypeError, KeyError) as error:
            is_torn = number == len(lines) and (bool(rows) or line.startswith(b"{"))
            if not is_torn:
                raise BadRequest(f"Expected a row of answers in line {number} of {name}") from error
    return rows


def _serialise(rows: Iterable[Json]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
