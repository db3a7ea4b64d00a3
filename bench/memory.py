"""The most memory that a side of a benchmark has held: its processes, and its files in shared memory.

Knows nothing about what the side does.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from mmserve.rundir import SHARED_MEMORY

_SAMPLE_S = 0.02


class FilesWatch:
    """The most bytes that a process's run directory in shared memory has held, by frequent looks.

    Resident sizes have a file only where, and as long as, it is mapped. One that is mapped counts twice
    here, so a side with such files is never made to look smaller than it is.
    """

    def __init__(self, pid: int) -> None:
        self._pattern = f"mmserve-{pid}-*/**/*"
        self.peak_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="files-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, sum(map(_size, SHARED_MEMORY.glob(self._pattern))))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def peak_bytes(pid: int) -> int:
    """The largest resident sizes of a process and all below it, summed; ended ones no longer count."""
    total = 0
    for one in _tree(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:  # it has just ended
            continue
        found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def _tree(pid: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name, in brackets, may hold anything
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    pending = [pid]
    while pending:
        one = pending.pop()
        yield one
        pending += children.get(one, [])
