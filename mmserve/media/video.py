"""Plans for video files: an index made by demuxing, and the frames of it that will be sampled.

Runs inside the decoding sandbox. PyAV's index is the one source of times, whoever decodes the frames.
Knows nothing about processes, deadlines or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from mmserve.errors import MediaError
from mmserve.media.backends import Frame, describe, open_reader
from mmserve.media.container import (
    Turn,
    best_stream,
    check_duration,
    open_container,
    packets,
    probe_turn,
    shown_at,
)
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan, VideoIndex, VideoPlan, check_options, sample, within
from mmserve.request import MediaOptions

Ticks = npt.NDArray[np.int64]


def plan_video(path: str | Path, options: MediaOptions, limits: MediaLimits) -> VideoPlan:
    """Decide which frames will be sampled. Only the first frame is decoded, for its orientation."""
    check_options(options, limits)
    with open_container(path) as container:
        stream = best_stream(container, limits)
        index = _demux_index(container, stream, limits)
        tick = float(stream.time_base or Fraction(1, 90_000))
        first_s = float(index.pts[0] * tick)
        started = container.start_time
        zero_s = first_s if started is None else min(first_s, started / av.time_base)
        times: npt.NDArray[np.float64] = index.pts.astype(np.float64) * tick - zero_s
        end_s = max(index.end_pts * tick - zero_s, float(times[-1]))
        check_duration(end_s, limits)
        if container.format.name == "gif":
            limits.check_animation(index.pts.size, stream.codec_context.width, stream.codec_context.height)
        chosen = _choose(index, times, end_s, tick, options, limits)
        turn = probe_turn(container, stream, limits)
        full = _upright_size(stream, turn)
        # the model's own square is not made here, though it would be smaller: FFmpeg's filters differ from
        # Pillow's by up to 40 levels, and Pillow takes longer for a frame than the decoder for all else
        width, height = within(*full, options.max_pixels)
        limits.check_size(width, height)
        limits.check_frames(chosen.size, width, height)
        duration_s = end_s - float(times[0])
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else (index.pts.size / duration_s if duration_s > 0 else 0.0)
        decoder = f"{describe(limits.video_backend)} stream {stream.index}"
        if full != (width, height):
            decoder += f" scaled to {width}x{height}"
        return MediaPlan(
            kind="video",
            width=width,
            height=height,
            duration_s=round(duration_s, 9),
            fps=fps,
            times_s=tuple(round(float(time), 9) for time in times[chosen]),
            frame_indices=tuple(chosen.tolist()),
            total_frames=index.pts.size,
            decoder=decoder,
            video=VideoIndex(
                container=container.format.name,
                stream=stream.index,
                start=int(index.key_seek[0]),
                turn=turn,
                pts=tuple(index.pts[chosen].tolist()),
                seek_to=tuple(index.key_seek[index.gop[chosen]].tolist()),
                gop_start=tuple(index.keys[index.gop[chosen]].tolist()),
            ),
        )


def decode_frames(
    path: str | Path, plan: VideoPlan, wanted: Sequence[int], limits: MediaLimits | None = None
) -> Iterator[tuple[int, Frame]]:
    """Yield (position in the plan, upright RGB frame) for each wanted position that decodes, by time."""
    with closing(open_reader(path, plan, limits or MediaLimits())) as reader:
        yield from reader.read(wanted)


class _Index(NamedTuple):
    """Every frame of a stream in order of presentation, and its GOPs.

    `keys` are the numbers of the frames that GOPs start with, `key_seek` where to seek for each;
    `gop` tells for every frame which of them it needs.
    """

    pts: Ticks
    end_pts: int
    keys: Ticks
    key_seek: Ticks
    gop: Ticks


def _demux_index(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> _Index:
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    end = 0
    # these seek by presentation time, the others by decoding time
    by_pts = container.format.name.startswith(("matroska", "mov"))
    for packet in packets(container, stream):
        if packet.is_discard:
            continue
        time = shown_at(packet)
        pts.append(time)
        end = max(end, time + (packet.duration or 0))
        if packet.is_keyframe:
            keys.append((time, time if by_pts or packet.dts is None else packet.dts))
        if len(pts) > limits.max_source_frames:
            raise MediaError(f"Expected at most {limits.max_source_frames} frames in a video, but got more")
    if not pts:
        raise MediaError("The video has no frames")
    shown = np.unique(np.asarray(pts, dtype=np.int64))
    if container.format.name == "gif":
        keys = keys[:1]  # frames are marked as keys but paint over the ones before
    key_pts, key_seek = np.asarray(sorted(keys) or [(pts[0], pts[0])], dtype=np.int64).T
    gop = np.maximum(np.searchsorted(key_pts, shown, side="right") - 1, 0)
    return _Index(shown, end, np.searchsorted(shown, key_pts).astype(np.int64), key_seek, gop)


def _choose(
    index: _Index,
    times: npt.NDArray[np.float64],
    end_s: float,
    tick_s: float,
    options: MediaOptions,
    limits: MediaLimits,
) -> Ticks:
    """Numbers of the sampled frames."""
    if not options.keyframes_only:
        return sample(times, end_s, tick_s, options, limits)
    keys = np.unique(index.keys)
    return keys[sample(times[keys], end_s, tick_s, options, limits)]


def _upright_size(stream: VideoStream, turn: Turn) -> tuple[int, int]:
    width, height = stream.codec_context.width, stream.codec_context.height
    return (height, width) if turn[0] else (width, height)
