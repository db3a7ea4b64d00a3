"""Frames by decord (the maintained fork `decord2`), by their number in order of presentation.

It does not tell which frames are damaged: in place of one it shows a neighbour, or gives up. Runs inside the
decoding sandbox. Knows nothing about sampling, processes or models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmserve.media.backends import INDEXED, Frame, Unsuited
from mmserve.media.container import is_mirrored
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan

os.environ.setdefault("PATH", "")  # decord reads it as it loads, and the sandbox has none
import decord

decord.logging.set_level(decord.logging.QUIET)


def describe() -> str:
    return f"decord {decord.__version__}"


def open_video(path: str | Path, plan: MediaPlan, limits: MediaLimits) -> DecordReader:
    return DecordReader(path, plan, limits)


class DecordReader:
    """One open file. Rotation is decord's own doing; mirrored videos and others are left to PyAV."""

    def __init__(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> None:
        assert plan.video is not None
        if is_mirrored(plan.video.turn) or plan.video.container not in INDEXED or _breaks(plan.width):
            raise Unsuited
        self._plan = plan
        self._reader = decord.VideoReader(
            str(path),
            ctx=decord.cpu(0),
            width=plan.width,
            height=plan.height,
            num_threads=limits.decode_threads,
        )
        # frames that an edit list hides have numbers here
        if len(self._reader) != plan.total_frames:
            raise Unsuited

    def close(self) -> None:
        del self._reader

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        # one by one it copies less than in a batch
        for position in sorted(set(wanted)):
            frame = self._reader[self._plan.frame_indices[position]]
            yield position, np.asarray(frame.asnumpy(), dtype=np.uint8)


def _breaks(width: int) -> bool:
    """Rows are padded to 64 pixels at most; a padded row can pass for several of a narrow picture's."""
    return width < 192 and width % 64 != 0
