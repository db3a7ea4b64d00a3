"""Frames by torchcodec, where it is installed, by their number in order of presentation.

It does not tell which frames are damaged. It brings torch into the decoding process. Runs inside the
decoding sandbox. Knows nothing about sampling, processes or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torchcodec.decoders import VideoDecoder

from mmserve.media.backends import INDEXED, Frame, Unsuited
from mmserve.media.container import UPRIGHT, is_mirrored
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan

_FRAMES_AT_ONCE = 8


def describe() -> str:
    return f"torchcodec {version('torchcodec')}"


def open_video(path: str | Path, plan: MediaPlan, limits: MediaLimits) -> TorchcodecReader:
    return TorchcodecReader(path, plan, limits)


class TorchcodecReader:
    """One open file. Mirrored, scaled and unindexed videos are left to PyAV, before 0.11 rotated ones too."""

    def __init__(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> None:
        assert plan.video is not None
        if plan.video.container not in INDEXED:
            raise Unsuited
        self._plan = plan
        self._decoder = VideoDecoder(
            str(path),
            stream_index=plan.video.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=limits.decode_threads,
            seek_mode="exact",
        )
        metadata, turn = self._decoder.metadata, plan.video.turn
        is_turned = turn == UPRIGHT or hasattr(metadata, "rotation")
        is_full_size = sorted((metadata.width, metadata.height)) == sorted((plan.width, plan.height))
        is_same_count = len(self._decoder) == plan.total_frames
        if is_mirrored(turn) or not (is_turned and is_full_size and is_same_count):
            raise Unsuited

    def close(self) -> None:
        del self._decoder

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        positions = sorted(set(wanted))
        for first in range(0, len(positions), _FRAMES_AT_ONCE):
            some = positions[first : first + _FRAMES_AT_ONCE]
            batch = self._decoder.get_frames_at([self._plan.frame_indices[position] for position in some])
            yield from zip(some, np.asarray(batch.data.numpy(), dtype=np.uint8), strict=True)
