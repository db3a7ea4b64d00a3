"""rundir.py: private directories that vanish with their owner, however it dies (R4, R29)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmserve.rundir import RunDir, remove_stale

OWNER = """
import sys
from pathlib import Path
from mmserve.rundir import RunDir
run = RunDir(base=Path(sys.argv[1]), shm_base=Path(sys.argv[2]))
(run.path / "file").write_text("x")
print(run.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "run").mkdir()
    (tmp_path / "shm").mkdir()
    return tmp_path / "run", tmp_path / "shm"


@pytest.fixture
def owner(bases: tuple[Path, Path]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, *map(str, bases)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(str(bases[0]))
        yield process
        process.kill()


def is_empty_soon(*directories: Path) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(list(directory.iterdir()) for directory in directories):
            return True
        os.sched_yield()
    return False


def test_directories_are_private_and_close_removes_them(bases: tuple[Path, Path]) -> None:
    with RunDir(base=bases[0], shm_base=bases[1]) as run:
        assert run.directories == (run.shm, run.path)
        for directory in run.directories:
            assert directory.stat().st_mode & 0o777 == 0o700
        (run.path / "left").write_text("x")
    run.close()
    assert is_empty_soon(*bases)


def test_run_directory_works_without_shared_memory(bases: tuple[Path, Path]) -> None:
    with RunDir(base=bases[0], shm_base=None) as run:
        assert run.directories == (run.path,)
    with RunDir(base=bases[0], shm_base=bases[0] / "missing") as run:
        assert run.shm is None


def test_base_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        with RunDir(shm_base=None) as run:
            assert run.path.parent == Path(short)
        # a Unix socket could not live under such a path
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{short}/{'x' * 80}")
        with RunDir(shm_base=None) as run:
            assert len(os.fsencode(run.path)) < 90


def test_killed_owner_leaves_nothing(bases: tuple[Path, Path], owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    assert is_empty_soon(*bases)


def test_owner_that_ends_leaves_nothing(bases: tuple[Path, Path], owner: subprocess.Popen[str]) -> None:
    assert owner.stdin is not None
    owner.stdin.close()
    assert owner.wait(timeout=10) == 0
    assert is_empty_soon(*bases)


def test_live_directories_are_never_stale(bases: tuple[Path, Path], owner: subprocess.Popen[str]) -> None:
    with RunDir(base=bases[0], shm_base=bases[1]):
        assert remove_stale(bases[0]) == remove_stale(bases[1]) == []
        assert len(list(bases[0].iterdir())) == 2
    assert owner.poll() is None


def test_stale_directories_are_removed_at_start(bases: tuple[Path, Path]) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    unlocked = bases[0] / f"mmserve-{os.getpid()}-00000001"  # its number was given to a new process
    half_made = bases[0] / f"mmserve-{dead.pid}-00000002"
    for path in (unlocked, half_made):
        path.mkdir()
        (path / "socket").write_text("x")
    (unlocked / "lock").touch()
    being_made = bases[0] / f"mmserve-{os.getpid()}-00000003"
    being_made.mkdir()
    (bases[0] / "mmserve-notes").mkdir()
    (bases[0] / f"mmserve-{dead.pid}-00000004").symlink_to(being_made)
    with RunDir(base=bases[0], shm_base=None) as run:
        names = {path.name for path in bases[0].iterdir()}
        assert names == {being_made.name, "mmserve-notes", f"mmserve-{dead.pid}-00000004", run.path.name}
