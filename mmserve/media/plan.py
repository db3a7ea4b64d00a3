"""Which frames of an item will be used, and when they are shown. Pure data and arithmetic.

Knows nothing about containers or codecs: `video`, `image`, `arrays`, `frames` and `animation` make these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from mmserve.errors import BadRequest, MediaError
from mmserve.media.limits import MediaLimits
from mmserve.request import MediaOptions

MAX_FPS = 1000.0


class VideoIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to find the sampled frames again, parallel to `MediaPlan.times_s`.

    `container` is FFmpeg's name of the kind of file. `pts` are in the stream's ticks; `seek_to[i]` is where
    a seek must land so that decoding forward yields frame i, in the clock the container seeks by; `start`
    is that of the stream's first frame. `gop_start[i]` is the number of the keyframe that frame i needs.
    `turn` makes a decoded frame upright: swap its axes, then mirror its rows, then its columns.
    """

    container: str
    stream: int
    start: int
    turn: tuple[bool, bool, bool]
    pts: tuple[int, ...]
    seek_to: tuple[int, ...]
    gop_start: tuple[int, ...]


class MediaPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One item as it will be sampled. `width` and `height` are upright; an image has one frame at time 0.

    `decoder` names what turns the bytes into pixels, for the keys of caches.
    """

    kind: Literal["image", "video", "array", "frames", "animation"]
    width: int
    height: int
    duration_s: float
    fps: float
    times_s: tuple[float, ...]
    frame_indices: tuple[int, ...]
    total_frames: int
    decoder: str
    video: VideoIndex | None = None

    @property
    def num_frames(self) -> int:
        return len(self.times_s)


VideoPlan = MediaPlan


def check_options(options: MediaOptions, limits: MediaLimits) -> None:
    """Raise for options that no media could satisfy."""
    if options.num_frames is not None and options.fps is not None:
        raise BadRequest("Expected either num_frames or fps, but got both")
    if options.num_frames is not None:
        count = options.num_frames
        if count < 1:
            raise BadRequest(f"Expected num_frames of at least 1, but got {count}")
        if count > limits.max_frames:
            raise MediaError(f"Expected num_frames of at most {limits.max_frames}, but got {count}")
    if options.max_pixels is not None and options.max_pixels < 1:
        raise BadRequest(f"Expected max_pixels of at least 1, but got {options.max_pixels}")
    if options.start_s < 0 or (options.end_s is not None and options.end_s <= options.start_s):
        found = f"{options.start_s:g} to {options.end_s}"
        raise BadRequest(f"Expected a start of 0 s or later and an end after it, but got {found}")
    if options.fps is not None and not 0 < options.fps <= MAX_FPS:
        raise BadRequest(f"Expected fps above 0 and at most {MAX_FPS:g}, but got {options.fps}")


def within(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """A frame's size: its own, or the largest of the same shape within `max_pixels`."""
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def sample_count(total: int, count: int) -> npt.NDArray[np.int64]:
    """`count` indices spread over `total` frames as transformers spreads them; all when there are fewer."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // count


def sample_clock(
    shown_at: npt.NDArray[np.float64], end_s: float, fps: float, tick_s: float
) -> npt.NDArray[np.int64]:
    """Indices of the frames on show at k/fps for every k before `end_s`, each once.

    `shown_at` is sorted. Containers round times to their tick, hence half a tick of tolerance;
    before the first frame, players show the first frame.
    """
    last_k = max(0, math.ceil(end_s * fps - 1e-9) - 1)
    # the first k at which each frame, or a later one, is on show
    first_k = np.ceil((shown_at - tick_s / 2) * fps - 1e-9)
    first_k[:1] = 0
    next_k = np.append(first_k[1:], last_k + 1)
    return np.flatnonzero((first_k < next_k) & (first_k <= last_k)).astype(np.int64)


def sample(
    shown_at: Sequence[float] | npt.NDArray[np.float64],
    end_s: float,
    tick_s: float,
    options: MediaOptions,
    limits: MediaLimits,
) -> npt.NDArray[np.int64]:
    """Indices of the frames that `options` ask for, out of frames shown at these times (sorted, seconds)."""
    times = np.asarray(shown_at, dtype=np.float64)
    # containers round times to their tick, hence half a tick of tolerance
    inside = times >= options.start_s - tick_s / 2
    if options.end_s is not None:
        inside &= times < options.end_s - tick_s / 2
    if not inside.any():
        asked = f"from {options.start_s:g} s" + ("" if options.end_s is None else f" to {options.end_s:g} s")
        raise MediaError(f"Expected frames {asked}, but the video ends after {end_s:g} s")
    if options.fps is not None:
        chosen = sample_clock(times, end_s, options.fps, tick_s)
        # a span between two ticks of a slow clock still has its first frame
        return chosen[inside[chosen]] if inside[chosen].any() else np.flatnonzero(inside)[:1]
    candidates = np.flatnonzero(inside)
    return candidates[sample_count(candidates.size, options.num_frames or limits.default_frames)]
