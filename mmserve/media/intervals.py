"""How the wanted frames of a plan are cut: into segments for the encoder, and into intervals for decoders.

A segment is what is delivered together. An interval is what one decoder does in order; where it can be
chosen it begins with a GOP, so that no frame is decoded by two. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mmserve.media.plan import MediaPlan


class Piece(NamedTuple):
    """Positions that lie in one segment and in one interval: a job."""

    interval: int
    positions: tuple[int, ...]


def cut(
    plan: MediaPlan, wanted: Sequence[int], segment_frames: int, decoders: int
) -> list[tuple[Piece, ...]]:
    """The pieces of every segment, in order."""
    intervals = _intervals(plan, wanted, segment_frames, decoders)
    segments = []
    for first in range(0, len(wanted), segment_frames):
        pieces: dict[int, list[int]] = {}
        for order in range(first, min(first + segment_frames, len(wanted))):
            pieces.setdefault(intervals[order], []).append(wanted[order])
        segments.append(tuple(Piece(interval, tuple(some)) for interval, some in pieces.items()))
    return segments


def _intervals(plan: MediaPlan, wanted: Sequence[int], segment_frames: int, decoders: int) -> list[int]:
    """The number of the interval that each wanted position belongs to.

    They are as short as a segment, shorter where that keeps all decoders busy, unless a GOP is longer.
    """
    if plan.video is None or decoders == 1:
        return [0] * len(wanted)
    least = min(segment_frames, -(-len(wanted) // decoders))
    numbers: list[int] = []
    number = length = 0
    for order, position in enumerate(wanted):
        is_new_gop = order > 0 and plan.video.gop_start[position] != plan.video.gop_start[wanted[order - 1]]
        if is_new_gop and length >= least:
            number, length = number + 1, 0
        numbers.append(number)
        length += 1
    return numbers
