"""Child processes: how they start, how their death is noticed, when they are started again.

A child is `python -m MODULE` in its own session with its configuration on stdin; it cannot outlive
the parent. Knows nothing about roles, messages or requests, and imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Self, TypeVar

import msgspec

from mmserve.errors import ConfigError
from mmserve.waker import Waker

T = TypeVar("T")
_PR_SET_PDEATHSIG: Final = 1
_STDERR: Final = 2
_KILL_WAIT_S: Final = 5.0


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child finds on its stdin."""

    parent_pid: int
    config: bytes


def die_with_parent(expected_ppid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # the parent may have died before the call above
    if os.getppid() != expected_ppid:
        raise SystemExit("The parent process is gone")


def receive_config(config_type: type[T]) -> T:
    """In the child, before any slow import: tie its life to the parent's and read its configuration."""
    try:
        envelope = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_Envelope)
        die_with_parent(envelope.parent_pid)
        return msgspec.msgpack.decode(envelope.config, type=config_type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError("Expected the process's configuration on stdin, but got something else") from error


class Child:
    """A running or dead child process and its pidfd.

    The process stays unreaped until `reap`, so its pid and process group cannot be reused before.
    """

    def __init__(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.pid = popen.pid
        self.killed_by_us = False
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)

    @classmethod
    def start(cls, module: str, config: object, *, name: str, env: Mapping[str, str] | None = None) -> Child:
        """Run `python -m module`; `config` is for its `receive_config`, `env` adds to ours.

        Call it on a thread that outlives the child: the kernel kills the child when that thread ends.
        """
        envelope = _Envelope(parent_pid=os.getpid(), config=msgspec.msgpack.encode(config))
        # a file in memory, unlike a pipe, takes any size without a reader
        with os.fdopen(os.memfd_create("mmserve-config", os.MFD_CLOEXEC), "w+b") as stdin:
            stdin.write(msgspec.msgpack.encode(envelope))
            stdin.flush()
            stdin.seek(0)
            popen = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=stdin,
                stdout=_STDERR,  # our stdout carries answers only
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        return cls(name, popen)

    def fileno(self) -> int:
        """The pidfd: readable once the process has ended."""
        return self._pidfd

    @property
    def is_running(self) -> bool:
        if self._pidfd < 0:
            return False
        with selectors.PollSelector() as selector:
            selector.register(self._pidfd, selectors.EVENT_READ)
            return not selector.select(0)

    @property
    def exit_code(self) -> int:
        """Of a reaped child that exited; 0 when a signal ended it."""
        return max(self._reaped_status(), 0)

    @property
    def exit_signal(self) -> int:
        """The signal that ended a reaped child; 0 when it exited."""
        return max(-self._reaped_status(), 0)

    def terminate(self) -> None:
        """Ask the process to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and everything it started, now."""
        if self.is_running:
            self.killed_by_us = True
            self._signal(signal.SIGKILL)
            self._kill_group()

    def reap(self) -> None:
        """Collect the exit status of an ended process and end what is left of its group."""
        if self._pidfd >= 0:
            self._kill_group()
            self._popen.wait()
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _reaped_status(self) -> int:
        status = self._popen.returncode
        assert status is not None, "the exit status is known after reap"
        return status


class ProcessWatcher:
    """Waits for the death of children. One thread owns it; `wake` is for threads and signal handlers."""

    def __init__(self) -> None:
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}

    @property
    def children(self) -> tuple[Child, ...]:
        """Those watched whose death has not been reported yet."""
        return tuple(self._children.values())

    def watch(self, child: Child) -> None:
        self._selector.register(child, selectors.EVENT_READ)
        self._children[child.pid] = child

    def wake(self) -> None:
        """Make a `poll` in progress, or the next one, return at once."""
        self._waker.wake()

    def poll(self, timeout_s: float) -> list[Child]:
        """Children that have died, reaped, each reported once; waits at most `timeout_s` for one."""
        dead = []
        for key, _ in self._selector.select(max(timeout_s, 0.0)):
            if isinstance(key.fileobj, Child):
                dead.append(key.fileobj)
            else:
                self._waker.clear()
        for child in dead:
            self._selector.unregister(child)
            del self._children[child.pid]
            child.reap()
        return dead

    def stop_all(self, grace_s: float) -> list[Child]:
        """Ask every child to end, kill after `grace_s` what has not; returns the dead.

        All are dead then, but for one that the kernel cannot end, stuck in a device: it stays watched.
        """
        for child in self.children:
            child.terminate()
        dead = self._poll_all(grace_s)
        for child in self.children:
            child.kill()
        return dead + self._poll_all(_KILL_WAIT_S)

    def _poll_all(self, timeout_s: float) -> list[Child]:
        dead: list[Child] = []
        deadline = time.monotonic() + timeout_s
        while self._children and (left_s := deadline - time.monotonic()) > 0:
            dead += self.poll(left_s)
        return dead

    def close(self) -> None:
        """Kill and reap what is still watched."""
        self.stop_all(0.0)
        self._selector.close()
        self._waker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Backoff:
    """When a slot's process may start again after a death. Pure: time and chance are given.

    The pause doubles from `first_s` to `max_s` with each death, plus up to a quarter at random, and
    starts over once a process was ready for `window_s`. `max_deaths` within `window_s` open the
    breaker, which stays open until `reset`.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.1,
        max_s: float = 32.0,
        max_deaths: int = 5,
        window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._max_deaths = max_deaths
        self._window_s = window_s
        self._clock = clock
        self._chance = chance
        self._next_s = first_s
        self._deaths: deque[float] = deque()
        self._ready_at: float | None = None
        self._open = False

    @property
    def is_open(self) -> bool:
        """The process dies too often to be worth starting."""
        return self._open

    def note_ready(self) -> None:
        self._ready_at = self._clock()

    def note_death(self) -> float | None:
        """Seconds to wait before the next start, or None: do not start again."""
        now = self._clock()
        if self._ready_at is not None and now - self._ready_at >= self._window_s:
            self._next_s = self._first_s
        self._ready_at = None
        self._deaths.append(now)
        while now - self._deaths[0] > self._window_s:
            self._deaths.popleft()
        self._open = self._open or len(self._deaths) >= self._max_deaths
        if self._open:
            return None
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._max_s)
        return pause_s * (1 + self._chance() / 4)

    def reset(self) -> None:
        """Forget the past, as for a slot that gets a new role."""
        self._next_s = self._first_s
        self._deaths.clear()
        self._ready_at = None
        self._open = False
