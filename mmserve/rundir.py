"""The private directories of one running server: sockets, leases and temporary files live there.

One under the user's runtime directory, one of the same name in shared memory. Both are mode 0700,
are locked as long as the owner lives, and vanish with it, however it dies. Knows nothing about
what is stored in them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from mmserve.errors import ConfigError

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # only 0700 directories are made in it
_NAME: Final = re.compile(r"mmserve-(\d+)-[0-9a-f]{8}")
_LOCK: Final = "lock"
# a Unix socket's path ends at 107 bytes, of which our own names need 45
_MAX_BASE_BYTES: Final = 60


class RunDir:
    """Owns the directories until `close`, the process's exit or its death.

    `path` always exists; `shm` is None where there is no shared-memory file system.
    """

    def __init__(self, *, base: Path | None = None, shm_base: Path | None = SHARED_MEMORY) -> None:
        base = base or _runtime_base()
        name = f"mmserve-{os.getpid()}-{secrets.token_hex(4)}"
        self._pid = os.getpid()
        self._locks: list[int] = []
        self._guard: subprocess.Popen[bytes] | None = None
        remove_stale(base)
        self.path = self._make(base / name)
        self.shm: Path | None = None
        if shm_base is not None and os.access(shm_base, os.W_OK | os.X_OK):
            remove_stale(shm_base)
            self.shm = self._make(shm_base / name)
        self._guard = _start_guard(self.directories)
        atexit.register(self.close)

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where leases may lie, the preferred place first."""
        return (self.path,) if self.shm is None else (self.shm, self.path)

    def close(self) -> None:
        """Remove everything; harmless when repeated and in a forked child."""
        if os.getpid() != self._pid or not self._locks:
            return
        atexit.unregister(self.close)
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _make(self, path: Path) -> Path:
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError("Expected a writable runtime directory, but it is not") from error
        # locked before it gets its name, so that nobody can take a fresh directory for a stale one
        fresh = path / f"{_LOCK}.new"
        lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh.rename(path / _LOCK)
        self._locks.append(lock)
        return path


def remove_stale(base: Path) -> list[Path]:
    """Remove run directories under `base` whose owner is gone; returns what was removed."""
    removed = []
    for path in base.glob("mmserve-*"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                continue
            if _remove_if_unowned(path, int(match.group(1))):
                removed.append(path)
    return removed


def _remove_if_unowned(path: Path, pid: int) -> bool:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        # its owner died while making or removing it, or is doing so right now
        if Path(f"/proc/{pid}").exists():
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def _runtime_base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for candidate in (runtime, tempfile.gettempdir()):
        if (
            candidate
            and len(os.fsencode(candidate)) <= _MAX_BASE_BYTES
            and os.access(candidate, os.W_OK | os.X_OK)
        ):
            return Path(candidate)
    return Path("/tmp")  # noqa: S108  # the run directory in it is 0700 with a random name


def _start_guard(directories: tuple[Path, ...]) -> subprocess.Popen[bytes] | None:
    """A shell that waits for the end of its stdin, which comes with our death, then removes all."""
    shell = shutil.which("sh")
    if shell is None:
        return None
    # the paths are arguments, never shell text
    return subprocess.Popen(
        [shell, "-c", 'read -r _; exec rm -rf -- "$@"', "sh", *map(str, directories)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
