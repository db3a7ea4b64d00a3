"""process.py: deaths are noticed, orphans do not exist, restarts slow down (R21, R28, R29)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import mmserve
from mmserve.errors import ConfigError
from mmserve.workers import process
from mmserve.workers.process import Backoff, Child, ProcessWatcher

CHILD = """
import os, signal, subprocess, sys, time
from mmserve.workers.process import receive_config
config = receive_config(dict[str, str])
if "report" in config:
    with open(config["report"] + ".part", "w") as f:
        f.write(f"{os.getpid()} {os.getpgrp()} {os.getsid(0)} {len(config.get('bulk', ''))}")
    os.rename(config["report"] + ".part", config["report"])
if config["do"] == "exit":
    sys.exit(int(config["code"]))
if config["do"] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if config["do"] == "grandchild":
    p = subprocess.Popen(["sleep", "600"])
    with open(config["pid"] + ".part", "w") as f:
        f.write(str(p.pid))
    os.rename(config["pid"] + ".part", config["pid"])
print("ready", flush=True)
while True:
    time.sleep(600)
"""
PARENT = """
import os, sys
from mmserve.workers.process import Child
child = Child.start("a_child", {"do": "wait", "report": sys.argv[1]}, name="c")
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Child]:
    (tmp_path / "a_child.py").write_text(CHILD)
    root = Path(mmserve.__path__[0]).parent
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{tmp_path}")

    def start_child(**config: str) -> Child:
        return Child.start("a_child", config, name="c")

    return start_child


@pytest.fixture
def watcher() -> Iterator[ProcessWatcher]:
    with ProcessWatcher() as watcher:
        yield watcher


def holds_soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        os.sched_yield()
    return condition()


def ends_soon(pid: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


def test_child_gets_any_configuration_and_its_own_group(
    start: Callable[..., Child], watcher: ProcessWatcher, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    child = start(do="exit", code="3", report=str(report), bulk="x" * 300_000)
    watcher.watch(child)
    assert watcher.poll(10) == [child]
    assert (child.exit_code, child.exit_signal, child.killed_by_us) == (3, 0, False)
    assert not child.is_running
    assert report.read_text() == f"{child.pid} {child.pid} {child.pid} 300000"
    assert watcher.children == ()
    assert watcher.poll(0) == []


def test_kill_from_outside_is_noticed_by_an_event(
    start: Callable[..., Child], watcher: ProcessWatcher
) -> None:
    # a loaded machine may be late once; a poll of the process table would be late each time
    noticed = []
    for _ in range(3):
        child = start(do="wait")
        watcher.watch(child)
        assert child.is_running
        os.kill(child.pid, signal.SIGKILL)
        noticed.append(watcher.poll(0.1) == [child])
        if not noticed[-1]:
            assert watcher.poll(10) == [child]
        assert (child.exit_code, child.exit_signal, child.killed_by_us) == (0, signal.SIGKILL, False)
    assert any(noticed)


def test_death_before_watch_is_noticed(start: Callable[..., Child], watcher: ProcessWatcher) -> None:
    child = start(do="exit", code="0")
    assert holds_soon(lambda: not child.is_running)
    watcher.watch(child)
    assert watcher.poll(10) == [child]
    assert child.exit_code == 0


def test_our_own_kill_is_marked(start: Callable[..., Child], watcher: ProcessWatcher) -> None:
    child = start(do="wait")
    watcher.watch(child)
    child.kill()
    assert watcher.poll(10) == [child]
    assert child.killed_by_us
    assert child.exit_signal == signal.SIGKILL
    child.kill()
    child.terminate()
    child.reap()


def test_kill_of_a_dead_child_takes_no_blame(start: Callable[..., Child], watcher: ProcessWatcher) -> None:
    child = start(do="wait")
    os.kill(child.pid, signal.SIGSEGV)
    assert holds_soon(lambda: not child.is_running)
    child.kill()
    child.reap()
    assert not child.killed_by_us
    assert child.exit_signal == signal.SIGSEGV


def test_what_a_child_started_dies_with_it(
    start: Callable[..., Child], watcher: ProcessWatcher, tmp_path: Path
) -> None:
    file = tmp_path / "grandchild"
    child = start(do="grandchild", pid=str(file))
    watcher.watch(child)
    assert holds_soon(file.exists)
    os.kill(child.pid, signal.SIGKILL)
    assert watcher.poll(10) == [child]
    assert ends_soon(int(file.read_text()))


def test_orphan_dies_with_its_parent(start: Callable[..., Child], tmp_path: Path) -> None:
    report = tmp_path / "report"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(report)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert holds_soon(report.exists)
        pidfd = os.pidfd_open(pid)
        parent.kill()
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)


def test_child_whose_parent_is_gone_does_not_start() -> None:
    code = (
        "import sys; from mmserve.workers.process import die_with_parent; die_with_parent(int(sys.argv[1]))"
    )
    for parent, status in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        run = subprocess.run([sys.executable, "-c", code, str(parent)], check=False, capture_output=True)
        assert run.returncode == status


def test_garbage_on_stdin_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "die_with_parent", lambda _: None)
    good = msgspec.msgpack.encode({"parent_pid": 1, "config": msgspec.msgpack.encode(5)})
    for data, valid in ((b"", False), (b"\xa2\xff\xfe", False), (good[:-1] + b"\xa1", False), (good, True)):
        with open(os.memfd_create("stdin"), "w+b") as file:
            file.write(data)
            file.seek(0)
            monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(file.fileno())))
            with sys.stdin:
                if valid:
                    assert process.receive_config(int) == 5
                else:
                    with pytest.raises(ConfigError):
                        process.receive_config(int)


def test_child_dies_with_the_thread_that_started_it(
    start: Callable[..., Child], watcher: ProcessWatcher, tmp_path: Path
) -> None:
    report = tmp_path / "report"

    def run() -> None:
        watcher.watch(start(do="wait", report=str(report)))
        assert holds_soon(report.exists)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (child,) = watcher.poll(10)
    assert child.exit_signal == signal.SIGKILL


def test_wake_interrupts_poll(watcher: ProcessWatcher) -> None:
    thread = threading.Thread(target=watcher.wake)
    thread.start()
    assert watcher.poll(60) == []
    thread.join()


def test_stop_all_asks_first_and_then_kills(start: Callable[..., Child], watcher: ProcessWatcher) -> None:
    willing = start(do="wait")
    stubborn = start(do="stubborn")
    for child in (willing, stubborn):
        watcher.watch(child)
    assert holds_soon(lambda: _ignores_sigterm(stubborn.pid))
    dead = watcher.stop_all(0.3)
    assert {child.pid for child in dead} == {willing.pid, stubborn.pid}
    assert (willing.exit_signal, willing.killed_by_us) == (signal.SIGTERM, False)
    assert (stubborn.exit_signal, stubborn.killed_by_us) == (signal.SIGKILL, True)


def _ignores_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_backoff_doubles_to_its_limit() -> None:
    clock = FakeClock()
    backoff = Backoff(clock=clock, chance=lambda: 0.0)
    pauses = []
    for _ in range(12):
        pauses.append(backoff.note_death())
        clock.now += 20
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 32, 32, 32])
    assert not backoff.is_open


def test_backoff_adds_up_to_a_quarter() -> None:
    backoff = Backoff(clock=FakeClock(), chance=lambda: 1.0)
    assert backoff.note_death() == pytest.approx(0.125)


def test_backoff_starts_over_after_a_healthy_time() -> None:
    clock = FakeClock()
    backoff = Backoff(clock=clock, chance=lambda: 0.0)
    backoff.note_death()
    backoff.note_death()
    backoff.note_ready()
    clock.now += 59
    assert backoff.note_death() == pytest.approx(0.4)
    # slow to start and never ready: not healthy, however long it took
    clock.now += 100
    assert backoff.note_death() == pytest.approx(0.8)
    backoff.note_ready()
    clock.now += 60
    assert backoff.note_death() == pytest.approx(0.1)


def test_breaker_opens_at_five_deaths_a_minute_and_stays_open() -> None:
    clock = FakeClock()
    backoff = Backoff(clock=clock)
    for _ in range(4):
        assert backoff.note_death() is not None
        clock.now += 15
    assert backoff.note_death() is None
    assert backoff.is_open
    clock.now += 1000
    assert backoff.note_death() is None
    backoff.reset()
    assert backoff.note_death() is not None


def test_breaker_stays_closed_when_deaths_are_rarer() -> None:
    clock = FakeClock()
    backoff = Backoff(clock=clock)
    for _ in range(20):
        assert backoff.note_death() is not None
        clock.now += 15.1
