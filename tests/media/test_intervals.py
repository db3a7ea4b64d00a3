"""What decoders do side by side: every frame once, in order, and no GOP in two places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve.media.intervals import cut
from mmserve.media.plan import MediaPlan, VideoIndex


def plan_of(gops: list[int], *, is_video: bool = True) -> MediaPlan:
    """One planned frame per entry; equal entries share a GOP."""
    count = len(gops)
    index = VideoIndex(
        container="mp4",
        stream=0,
        start=0,
        turn=(False, False, False),
        pts=tuple(range(count)),
        seek_to=tuple(gops),
        gop_start=tuple(gops),
    )
    return MediaPlan(
        kind="video" if is_video else "array",
        width=4,
        height=4,
        duration_s=1.0,
        fps=1.0,
        times_s=tuple(map(float, range(count))),
        frame_indices=tuple(range(count)),
        total_frames=count,
        decoder="none",
        video=index if is_video else None,
    )


@given(
    gops=st.lists(st.integers(0, 9), min_size=1, max_size=60).map(sorted),
    segment_frames=st.integers(1, 9),
    decoders=st.integers(1, 8),
    data=st.data(),
)
def test_every_wanted_frame_is_one_piece_of_its_segment(
    gops: list[int], segment_frames: int, decoders: int, data: st.DataObject
) -> None:
    plan = plan_of(gops)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(gops) - 1))))
    segments = cut(plan, wanted, segment_frames, decoders)
    flat = [[position for piece in segment for position in piece.positions] for segment in segments]
    assert flat == [wanted[first : first + segment_frames] for first in range(0, len(wanted), segment_frames)]
    pieces = [piece for segment in segments for piece in segment]
    homes: dict[int, set[int]] = {}
    for piece in pieces:
        for position in piece.positions:
            homes.setdefault(gops[position], set()).add(piece.interval)
    assert all(len(intervals) == 1 for intervals in homes.values())
    assert [piece.interval for piece in pieces] == sorted(piece.interval for piece in pieces)


@pytest.mark.parametrize(
    ("gops", "decoders", "expected"),
    [
        (list(range(32)), 1, [0] * 4),
        (list(range(32)), 2, [0, 1, 2, 3]),
        (list(range(16)), 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # two segments, all decoders busy
        ([0] * 32, 4, [0] * 4),  # one GOP is one decoder's
        ([0] * 12 + [1] * 12, 2, [0, 0, 1, 1]),  # the segment in the middle has two homes
    ],
)
def test_intervals_of_usual_videos(gops: list[int], decoders: int, expected: list[int]) -> None:
    segments = cut(plan_of(gops), range(len(gops)), 8, decoders)
    assert [piece.interval for segment in segments for piece in segment] == expected


def test_arrays_are_one_interval() -> None:
    segments = cut(plan_of(list(range(20)), is_video=False), range(20), 8, 4)
    assert [[piece.interval for piece in segment] for segment in segments] == [[0], [0], [0]]
