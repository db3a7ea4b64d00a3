"""Several decoding processes: segments in order and bounded ahead, and one death is one item's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmserve.errors import MediaError, Unavailable
from mmserve.media.arrays import save_frames
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.pool import SandboxPool
from mmserve.media.store import ContentStore
from mmserve.request import MediaOptions, MediaRef
from tests.media.clips import make_video, reference, shade, shade_of

LIMITS = MediaLimits(job_deadline_s=20)
FRAME_BYTES = 64 * 48 * 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> MediaRef:
    path = make_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=40, gop=5, b_frames=2)
    return MediaRef(
        modality="video", path=str(path), digest="0" * 64, source="clip", options=MediaOptions(num_frames=40)
    )


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SandboxPool]:
    yield from opened(tmp_path / "frames", LIMITS)


def opened(directory: Path, limits: MediaLimits, processes: int = 2) -> Iterator[SandboxPool]:
    directory.mkdir()
    made = SandboxPool(directory, limits, processes=processes)
    yield made
    made.close()
    assert list(directory.iterdir()) == []


def pids(pool: SandboxPool) -> list[int]:
    sandboxes = [lane.sandbox for lane in pool._lanes]
    return [box._thread.submit(box._start).result()._popen.pid for box in sandboxes]


@pytest.mark.parametrize("segment_frames", [8, 3])
def test_segments_come_in_order_from_several_processes(
    pool: SandboxPool, clip: MediaRef, segment_frames: int
) -> None:
    plan = pool.plan(clip)
    wanted = [position for position in range(40) if position % 7]
    segments = list(pool.segments(clip, plan, wanted, segment_frames))
    assert [position for segment in segments for position in segment.positions] == wanted
    assert {len(segment.positions) for segment in segments[:-1]} == {segment_frames}
    for segment in segments:
        assert segment.lost == ()
        assert segment.decode_ms > 0
        for position, frame in zip(segment.positions, segment.frames, strict=True):
            assert abs(shade_of(frame) - shade(position)) <= 4
    assert len(set(pids(pool))) == 2
    assert pool._ahead_bytes == 0
    assert [lane.load for lane in pool._lanes] == [0, 0]


def test_one_item_needs_one_process(pool: SandboxPool, clip: MediaRef) -> None:
    plan = pool.plan(clip)
    decoded = pool.decode(clip, plan, [3, 1, 3])
    assert decoded.positions == (1, 3)
    assert len(pool._lanes) == 1
    with pytest.raises(MediaError, match="positions from 0 to 39"):
        pool.segments(clip, plan, [40])


def test_what_is_decoded_ahead_has_a_budget_over_all_items(tmp_path: Path, clip: MediaRef) -> None:
    limits = replace(LIMITS, max_ahead_bytes=16 * FRAME_BYTES)
    for pool in opened(tmp_path / "frames", limits):
        plan = pool.plan(clip)
        first, second = pool.segments(clip, plan), pool.segments(clip, plan)
        assert (len(first._ahead), len(second._ahead)) == (2, 1)  # one is always on its way
        assert len(next(first).positions) == 8
        assert len(next(second).positions) == 8
        assert pool._ahead_bytes <= limits.max_ahead_bytes
        assert [segment.positions[0] for segment in first] == [8, 16, 24, 32]
        assert [segment.positions[0] for segment in second] == [8, 16, 24, 32]
        assert pool._ahead_bytes == 0


def test_readiness_can_be_asked(pool: SandboxPool, clip: MediaRef) -> None:
    segments = pool.segments(clip, pool.plan(clip), range(8))
    while not segments.is_ready():
        segments.wait()
    assert len(next(segments).positions) == 8
    assert segments.is_ready()
    with pytest.raises(StopIteration):
        next(segments)


def test_whether_all_is_there_can_be_asked(pool: SandboxPool, clip: MediaRef) -> None:
    segments = pool.segments(clip, pool.plan(clip))
    while not segments.is_ready(whole=True):
        segments.wait()
    assert all(piece.done() for segment in segments._ahead for piece in segment.pieces)
    assert len(list(segments)) == 5
    segments.wait()  # for nothing


def test_waiting_ends_though_nothing_comes(pool: SandboxPool, clip: MediaRef) -> None:
    """A worker that waits for its decoders must hear commands, and be heard."""
    plan = pool.plan(clip)
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGSTOP)
    try:
        segments = pool.segments(clip, plan, range(2))
        started_at = time.monotonic()
        segments.wait()
        assert time.monotonic() - started_at < LIMITS.job_deadline_s / 2
        assert not segments.is_ready()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert next(segments).positions == (0, 1)


def test_a_segment_left_early_gives_everything_back(pool: SandboxPool, clip: MediaRef) -> None:
    segments = pool.segments(clip, pool.plan(clip))
    next(segments)
    segments.close()
    assert pool._ahead_bytes == 0
    assert list(segments) == []


def test_a_death_fails_the_item_and_nobody_else(pool: SandboxPool, clip: MediaRef) -> None:
    plan = pool.plan(clip)
    list(pool.segments(clip, plan))  # now there are two processes
    for pid in pids(pool):
        os.kill(pid, signal.SIGSTOP)
    broken = pool.segments(clip, plan, range(8))
    home = next(iter(broken._lanes.values()))
    stopped = dict(zip((lane.sandbox for lane in pool._lanes), pids_of_stopped(pool), strict=True))
    os.kill(stopped[home.sandbox], signal.SIGKILL)
    with pytest.raises(MediaError, match="made the decoder fail"):
        list(broken)
    for pid in stopped.values():
        if pid != stopped[home.sandbox]:
            os.kill(pid, signal.SIGCONT)
    assert [len(segment.positions) for segment in pool.segments(clip, plan)] == [8] * 5


def pids_of_stopped(pool: SandboxPool) -> list[int]:
    """Without waiting in line behind jobs that do not move."""
    processes = [lane.sandbox._process for lane in pool._lanes]
    return [process._popen.pid for process in processes if process is not None]


def test_losses_are_reported_with_their_segment(pool: SandboxPool, tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.ts", gop=6)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 188 * 4] = b"\x47" + b"\xff" * (188 * 4 - 1)
    path.write_bytes(content)
    ref = reference(path)
    plan = pool.plan(ref)
    segments = list(pool.segments(ref, plan))
    lost = [position for segment in segments for position in segment.lost]
    kept = [position for segment in segments for position in segment.positions]
    assert sorted(lost + kept) == list(range(plan.num_frames))
    assert kept == sorted(kept)
    assert sum(len(segment.frames) for segment in segments) == len(kept)


def test_arrays_come_in_segments_too(pool: SandboxPool, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (10, 4, 6, 3), dtype=np.uint8)
    ref = save_frames(frames, ContentStore(tmp_path), "video", fps=2.0)
    plan: MediaPlan = pool.plan(ref)
    np.testing.assert_array_equal(np.concatenate([s.frames for s in pool.segments(ref, plan)]), frames)


def test_close_ends_what_runs_and_is_final(tmp_path: Path, clip: MediaRef) -> None:
    for pool in opened(tmp_path / "frames", LIMITS):
        plan = pool.plan(clip)
        list(pool.segments(clip, plan))
        before = pids(pool)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        segments = pool.segments(clip, plan)
        pool.close()
        with pytest.raises(Unavailable):
            next(segments)
        with pytest.raises(Unavailable):
            pool.plan(clip)
        assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_what_somebody_waits_for_passes_what_is_decoded_ahead(tmp_path: Path, clip: MediaRef) -> None:
    for one in opened(tmp_path / "frames", LIMITS, processes=1):
        plan = one.plan(clip)
        ahead = one.segments(clip, plan, range(40), 1)
        assert one.plan(clip) == plan
        assert not ahead.is_ready(whole=True)
        assert one.decode(clip, plan, [3]).positions == (3,)
        assert not ahead.is_ready(whole=True)
        assert [segment.positions for segment in ahead] == [(position,) for position in range(40)]
