"""Several decoding processes for one worker: items, and the segments of one item, decode side by side.

Imports no torch and no decoder. Knows nothing about models or about what frames are for.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mmserve.cores import usable_cores
from mmserve.errors import Unavailable
from mmserve.media.intervals import Piece, cut
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.sandbox import Decoded, Sandbox, check_positions
from mmserve.request import SEGMENT_FRAMES, MediaRef

WAIT_S = 0.05  # at a time: who waits hears nothing else
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Lane:
    """A sandbox and how many frames wait for it."""

    sandbox: Sandbox
    load: int = 0


class SandboxPool:
    """Up to `processes` sandboxes, by default one per core; each but the first starts when it is needed.

    Safe to use from several threads; it has one thread per process itself. Every job ends as in
    `Sandbox`; when a process dies only the item that it was decoding fails.
    """

    def __init__(
        self, directory: str | Path, limits: MediaLimits | None = None, processes: int | None = None
    ) -> None:
        self._directory = Path(directory)
        self._limits = limits or MediaLimits()
        self.processes = processes or usable_cores()
        self._lock = threading.Lock()
        self._is_closed = False
        self._ahead_bytes = 0
        self._done: Counter[str] = Counter()
        self._lanes = [_Lane(Sandbox(self._directory, self._limits))]

    def plan(self, ref: MediaRef) -> MediaPlan:
        """Which frames of the item will be used; an image has one."""
        plan = self._submit(self._free_lane(), 1, lambda sandbox: sandbox.submit_plan(ref)).result()
        self._count(items_opened=1)
        return plan

    def decode(self, ref: MediaRef, plan: MediaPlan, positions: Sequence[int] | None = None) -> Decoded:
        """The frames at these positions of the plan, or all of them, at once and in one process."""
        wanted = check_positions(plan, positions)
        return self._submit_decode(self._free_lane(), ref, plan, wanted, ahead=False).result()

    def segments(
        self,
        ref: MediaRef,
        plan: MediaPlan,
        positions: Sequence[int] | None = None,
        segment_frames: int = SEGMENT_FRAMES,
    ) -> Segments:
        """The same frames in order, `segment_frames` at a time. Decoding begins at once."""
        return Segments(self, ref, plan, check_positions(plan, positions), segment_frames)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """What was done since the start, and what waits or is held now."""
        with self._lock:
            now = {"frames_to_decode": sum(lane.load for lane in self._lanes)}
            return dict(self._done), now | {"decoded_ahead_bytes": self._ahead_bytes}

    def close(self) -> None:
        """Kill all processes, also under running jobs, which then fail."""
        with self._lock:
            self._is_closed = True
            lanes = list(self._lanes)
        for lane in lanes:
            lane.sandbox.close()

    def _free_lane(self) -> _Lane:
        """The sandbox with the least to do, or a new one when all have something to do."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("The media decoder is closed")
            lane = min(self._lanes, key=lambda lane: lane.load)
            if lane.load and len(self._lanes) < self.processes:
                lane = _Lane(Sandbox(self._directory, self._limits))
                self._lanes.append(lane)
            return lane

    def _submit_decode(
        self, lane: _Lane, ref: MediaRef, plan: MediaPlan, wanted: tuple[int, ...], *, ahead: bool
    ) -> Future[Decoded]:
        future = self._submit(
            lane, len(wanted), lambda sandbox: sandbox.submit_decode(ref, plan, wanted, ahead=ahead)
        )
        future.add_done_callback(self._count_decoded)
        return future

    def _count_decoded(self, future: Future[Decoded]) -> None:
        if future.cancelled():
            return
        if future.exception() is not None:
            self._count(decodes_failed=1)
            return
        decoded = future.result()
        self._count(intervals_decoded=1, frames_decoded=len(decoded.positions), frames_lost=len(decoded.lost))

    def _count(self, **more: int) -> None:
        with self._lock:
            self._done.update(more)

    def _submit(
        self, lane: _Lane, load: int, submit: Callable[[Sandbox], Future[_Result]]
    ) -> Future[_Result]:
        self._add_load(lane, load)
        try:
            future = submit(lane.sandbox)
        except Unavailable:
            self._add_load(lane, -load)
            raise
        future.add_done_callback(lambda _: self._add_load(lane, -load))
        return future

    def _add_load(self, lane: _Lane, load: int) -> None:
        with self._lock:
            lane.load += load

    def _reserve(self, size: int) -> bool:
        """Take from what all items together may decode ahead."""
        with self._lock:
            if self._ahead_bytes + size > self._limits.max_ahead_bytes:
                return False
            self._ahead_bytes += size
            return True

    def _release(self, size: int) -> None:
        with self._lock:
            self._ahead_bytes -= size


class _Ahead(NamedTuple):
    """A segment that was asked for: its pieces, and what it holds of the budget."""

    positions: tuple[int, ...]
    pieces: tuple[Future[Decoded], ...]
    reserved: int


class Segments:
    """The segments of one item in order, as an iterator that others decode for while its user works.

    An error belongs to the segment it comes in place of, and is the last thing that comes. Close it
    when it is left early. One thread at a time may use it.
    """

    def __init__(
        self, pool: SandboxPool, ref: MediaRef, plan: MediaPlan, wanted: tuple[int, ...], segment_frames: int
    ) -> None:
        self._pool = pool
        self._ref = ref
        self._plan = plan
        # of large frames fewer come together: one segment fits what all may decode ahead
        fitting = pool._limits.max_ahead_bytes // (plan.width * plan.height * 3)
        self._segment_frames = max(1, min(segment_frames, fitting))
        self._left: deque[tuple[Piece, ...]] = deque()
        self._ahead: deque[_Ahead] = deque()
        self._lanes: dict[int, _Lane] = {}  # by interval
        self._plan_on(wanted)

    def __iter__(self) -> Iterator[Decoded]:
        return self

    def __next__(self) -> Decoded:
        if not self._ahead:
            raise StopIteration
        head = self._ahead[0]
        try:
            decoded = _join([piece.result() for piece in head.pieces])
            self._ahead.popleft()
            self._pool._release(head.reserved)
            self._fill()
        except BaseException:
            self.close()
            raise
        return decoded

    def is_ready(self, *, whole: bool = False) -> bool:
        """Whether the next segment, or the end, is there without waiting; `whole`: all that was asked for."""
        return all(piece.done() for piece in self._pieces(whole=whole))

    def wait(self) -> None:
        """Until one piece more is there, or for `WAIT_S`: pieces of other items may come before it."""
        missing = [piece for piece in self._pieces(whole=True) if not piece.done()]
        concurrent.futures.wait(missing[:1], WAIT_S)

    def _pieces(self, *, whole: bool) -> list[Future[Decoded]]:
        """Of the segments that were asked for, or of the next one."""
        segments = self._ahead if whole else itertools.islice(self._ahead, 1)
        return [piece for segment in segments for piece in segment.pieces]

    def change(self, positions: Iterable[int]) -> None:
        """From now on exactly these frames, not taken yet, are wanted; what is decoded of them is kept."""
        wanted = set(positions)
        kept = [segment for segment in self._ahead if wanted.issuperset(segment.positions)]
        for segment in self._ahead:
            if segment not in kept:
                self._give_up(segment)
        self._ahead = deque(kept)
        self._plan_on(tuple(sorted(wanted.difference(*(segment.positions for segment in kept)))))

    def close(self) -> None:
        """Give up what has not been taken yet."""
        self._left.clear()
        while self._ahead:
            self._give_up(self._ahead.popleft())

    def _give_up(self, segment: _Ahead) -> None:
        for piece in segment.pieces:
            piece.cancel()
        self._pool._release(segment.reserved)

    def _plan_on(self, wanted: tuple[int, ...]) -> None:
        self._left = deque(cut(self._plan, wanted, self._segment_frames, self._pool.processes))
        self._lanes.clear()
        self._fill()

    def _fill(self) -> None:
        """Ask for segments up to the budget, for one at least."""
        frame_bytes = self._plan.width * self._plan.height * 3
        while self._left:
            size = sum(len(piece.positions) for piece in self._left[0]) * frame_bytes
            if not self._pool._reserve(size):
                if self._ahead:
                    return
                size = 0
            pieces = self._left.popleft()
            positions = sum((piece.positions for piece in pieces), ())
            self._ahead.append(_Ahead(positions, tuple(self._ask(piece) for piece in pieces), size))

    def _ask(self, piece: Piece) -> Future[Decoded]:
        lane = self._lanes.get(piece.interval)
        if lane is None:
            lane = self._lanes[piece.interval] = self._pool._free_lane()
        return self._pool._submit_decode(lane, self._ref, self._plan, piece.positions, ahead=True)


def _join(parts: list[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]
    return Decoded(
        np.concatenate([part.frames for part in parts]),
        sum((part.positions for part in parts), ()),
        sum((part.lost for part in parts), ()),
        sum(part.decode_ms for part in parts),
    )
