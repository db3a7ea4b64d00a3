"""Decoding in a process of its own that may crash, hang or be taken over without harm to the worker.

`Sandbox` is the worker's side; `python -m mmserve.media.sandbox` is the process. Imports no torch and,
on the worker's side, no decoder. Knows nothing about models, or that there may be several of it.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mmserve.errors import MediaError, Unavailable, WireError, from_code
from mmserve.media.arrays import SUFFIX, open_frames, plan_array
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan, check_options
from mmserve.media.protocol import (
    HEADER,
    DecodeMedia,
    DecoderReady,
    Job,
    JobFailed,
    MediaDecoded,
    MediaPlanned,
    PlanMedia,
    Reply,
    StartDecoder,
    body_length,
    pack,
    unpack_reply,
)
from mmserve.request import MediaRef

_PACKAGE_ROOT = str(Path(__file__).parents[2])
_READ_BYTES = 1 << 16
_CLOSED = "The media decoder is closed"
_Wanted = TypeVar("_Wanted", bound=Reply)
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """Frames that decoded, upright RGB, with their positions in the plan; `lost` did not decode."""

    frames: npt.NDArray[np.uint8]  # [n, H, W, 3]
    positions: tuple[int, ...]
    lost: tuple[int, ...]
    decode_ms: float


def check_positions(plan: MediaPlan, positions: Sequence[int] | None) -> tuple[int, ...]:
    """In order and each once; None means all."""
    wanted = tuple(sorted(set(range(plan.num_frames) if positions is None else positions)))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < plan.num_frames:
        found = f"{wanted[0]} to {wanted[-1]}"
        raise MediaError(f"Expected positions from 0 to {plan.num_frames - 1}, but got {found}")
    return wanted


class Sandbox:
    """One decoding process, started again whenever it dies, and the thread that talks to it.

    Jobs wait in line, from whatever thread they come; those that are `ahead` of their time let the others
    pass. `directory` is where frames pass through; nothing stays in it. Every job ends
    `limits.job_deadline_s` after it began: what is not done by then is killed and the media is blamed.
    """

    def __init__(self, directory: str | Path, limits: MediaLimits | None = None) -> None:
        self._directory = Path(directory)
        self._limits = limits or MediaLimits()
        self._is_closed = False
        self._process: _Process | None = None
        self._lines: tuple[deque[_Job], deque[_Job]] = deque(), deque()  # somebody waits for the first
        # the kernel kills a child when the *thread* that started it ends, so one thread starts them
        # all and lives as long as the sandbox
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="media-sandbox")
        self._thread.submit(self._prepare)

    def plan(self, ref: MediaRef) -> MediaPlan:
        """Which frames of the item will be used; an image has one."""
        return self.submit_plan(ref).result()

    def decode(self, ref: MediaRef, plan: MediaPlan, positions: Sequence[int] | None = None) -> Decoded:
        """The frames at these positions of the plan, or all of them."""
        return self.submit_decode(ref, plan, check_positions(plan, positions)).result()

    def submit_plan(self, ref: MediaRef) -> Future[MediaPlan]:
        return self._submit(lambda: self._plan(ref))

    def submit_decode(
        self, ref: MediaRef, plan: MediaPlan, wanted: tuple[int, ...], *, ahead: bool = False
    ) -> Future[Decoded]:
        """`wanted` are checked positions."""
        return self._submit(lambda: self._decode(ref, plan, wanted), ahead=ahead)

    def close(self) -> None:
        """Kill the process, also under a running job, which then fails, as do those in line."""
        if self._is_closed:
            return
        self._is_closed = True
        if (process := self._process) is not None:
            process.interrupt()
        self._thread.submit(self._stop)
        self._thread.shutdown(wait=True)

    def _submit(self, job: Callable[[], _Result], *, ahead: bool = False) -> Future[_Result]:
        if self._is_closed:
            raise Unavailable(_CLOSED)
        future: Future[_Result] = Future()
        self._lines[ahead].append((future, job))
        try:
            self._thread.submit(self._run_next)
        except RuntimeError as error:  # closed in between
            raise Unavailable(_CLOSED) from error
        return future

    # what follows runs on the sandbox's thread

    def _run_next(self) -> None:
        """It runs as often as jobs are submitted, so there is one for it each time."""
        future, job = next(filter(None, self._lines)).popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:  # whoever waits for it is told
            future.set_exception(error)

    def _plan(self, ref: MediaRef) -> MediaPlan:
        if ref.path.endswith(SUFFIX):
            return plan_array(ref, self._limits)
        check_options(ref.options, self._limits)
        return self._ask(PlanMedia(ref=ref), MediaPlanned).plan

    def _decode(self, ref: MediaRef, plan: MediaPlan, wanted: tuple[int, ...]) -> Decoded:
        if plan.kind == "array":
            return self._copy_array(ref, plan, wanted)
        name = f"{secrets.token_hex(16)}.frames"
        path = self._directory / name
        job = DecodeMedia(ref=ref, plan=plan, positions=wanted, file_name=name)
        try:
            reply = self._ask(job, MediaDecoded)
            if not set(reply.positions) <= set(wanted) or len(set(reply.positions)) != len(reply.positions):
                raise WireError("Expected frames at the wanted positions, but got others")
            frames = _map_frames(path, (len(reply.positions), plan.height, plan.width, 3))
        finally:
            path.unlink(missing_ok=True)
        lost = tuple(position for position in wanted if position not in set(reply.positions))
        return Decoded(frames, reply.positions, lost, reply.decode_ms)

    def _copy_array(self, ref: MediaRef, plan: MediaPlan, wanted: tuple[int, ...]) -> Decoded:
        began = time.perf_counter()
        stored = open_frames(ref.path, self._limits)
        if stored.shape != (plan.num_frames, plan.height, plan.width, 3):
            raise MediaError("The array changed between planning and decoding")
        frames = np.array(stored[list(wanted)], dtype=np.uint8)
        return Decoded(frames, wanted, (), (time.perf_counter() - began) * 1e3)

    def _ask(self, job: PlanMedia | DecodeMedia, expected: type[_Wanted]) -> _Wanted:
        process = self._start()
        try:
            reply = process.ask(job, self._limits.job_deadline_s)
        except (OSError, EOFError, TimeoutError, WireError) as error:
            self._replace()
            if self._is_closed:
                raise Unavailable("The media decoder was closed") from error
            log.warning("media decoder ended: %s, exit status %s", type(error).__name__, process.status)
            if isinstance(error, TimeoutError):
                limit = f"{self._limits.job_deadline_s:g} s"
                raise MediaError(f"Expected media that decodes within {limit}, but it took longer") from error
            raise MediaError("The media made the decoder fail") from error
        if process.jobs >= self._limits.process_jobs:
            self._replace()
        if isinstance(reply, JobFailed):
            raise from_code(reply.code, reply.message)
        if not isinstance(reply, expected):
            raise WireError("Expected another answer from the media decoder")
        return reply

    def _start(self) -> _Process:
        if self._process is None and not self._is_closed:
            self._process = _Process(self._directory, self._limits)
        # looked at after the process is known to `close`, so that one of the two sees the other
        if self._is_closed or self._process is None:
            raise Unavailable(_CLOSED)
        return self._process

    def _prepare(self) -> None:
        """Start before somebody waits for it. Who asks for a job starts again, and is told why not."""
        try:
            self._start()
        except Unavailable as error:
            log.warning("media decoder not started: %s", error.public_message)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _replace(self) -> None:
        self._stop()
        if not self._is_closed:
            self._thread.submit(self._prepare)


_Job = tuple[Future[Any], Callable[[], Any]]


class _Process:
    """One life of the decoding process. Made in the thread whose end should end it."""

    def __init__(self, directory: Path, limits: MediaLimits) -> None:
        self.jobs = 0
        # nothing of the worker's environment: it may hold keys
        environment = {
            "PYTHONPATH": _PACKAGE_ROOT,
            "PYTHONNOUSERSITE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "mmserve.media.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            process_group=0,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._to, self._from = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        start = StartDecoder(directory=str(directory.resolve()), limits=limits, parent_pid=os.getpid())
        try:
            ready = self._exchange(start, limits.start_deadline_s)
            if not isinstance(ready, DecoderReady):
                raise WireError("Expected the media decoder to be ready")
        except (OSError, EOFError, TimeoutError, WireError) as error:
            self.kill()
            raise Unavailable("The media decoder does not start") from error

    @property
    def status(self) -> int | None:
        return self._popen.returncode

    def ask(self, job: Job, timeout_s: float) -> Reply:
        self.jobs += 1
        return self._exchange(job, timeout_s)

    def interrupt(self) -> None:
        self._popen.kill()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.stdout.close()

    def _exchange(self, job: Job, timeout_s: float) -> Reply:
        until = time.monotonic() + timeout_s
        self._write(pack(job), until)
        length = body_length(self._read(HEADER.size, until))
        return unpack_reply(self._read(length, until))

    def _write(self, data: bytes, until: float) -> None:
        left = memoryview(data)
        while left:
            _wait(self._to, select.POLLOUT, until)
            try:
                left = left[os.write(self._to, left) :]
            except BlockingIOError:
                continue

    def _read(self, length: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            _wait(self._from, select.POLLIN, until)
            part = os.read(self._from, min(_READ_BYTES, length - len(data)))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _wait(fd: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1e3):
        raise TimeoutError


def _map_frames(path: Path, shape: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    size = int(np.prod(shape))
    if size == 0:
        return np.empty(shape, dtype=np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < size:
            raise WireError("Expected a larger file of frames")
        # a private map: writing to the frames is allowed and stays here
        return np.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_COPY), dtype=np.uint8).reshape(shape)
    finally:
        os.close(fd)


def main() -> None:
    """The process itself: jobs come on stdin, answers leave by what was stdout."""
    from mmserve.media import jobs

    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)  # what libraries print must not end up among the answers
        jobs.serve(requests, replies)


if __name__ == "__main__":
    main()
