"""Animated WebP as video: times from the chunks of its file, frames by Pillow.

FFmpeg does not decode these; GIFs are videos to it. Runs inside the decoding sandbox. Knows nothing about
processes or models.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmserve.errors import MediaError
from mmserve.media.image import UnreadableImage, describe, opened, resized, upright_pixels
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan, check_options, sample, within
from mmserve.request import MediaOptions

_CHUNK = struct.Struct("<4sI")
_HEAD_BYTES = 12  # "RIFF", a size, "WEBP"
_DURATION = slice(12, 15)  # of an ANMF chunk, in milliseconds
_MS_OF_NONE = 100  # what browsers take where no frame has a duration
_TICK_S = 1e-3


def is_webp(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False  # who reads it as a video says what is wrong
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def plan_animation(path: str | Path, options: MediaOptions, limits: MediaLimits) -> MediaPlan:
    """Decide which frames will be sampled, without decoding one. A still picture is a video of one frame."""
    check_options(options, limits)
    durations = _durations_ms(path, limits)
    with opened(path, limits) as image:
        full = image.size
    limits.check_animation(len(durations), *full)
    ends = np.cumsum(durations) / 1e3
    end_s = float(ends[-1])
    if end_s > limits.max_duration_s:
        raise MediaError(f"Expected a video of at most {limits.max_duration_s:g} s, but got {end_s:.0f} s")
    times = np.concatenate([[0.0], ends[:-1]])
    # what takes no time is never seen
    shown = np.flatnonzero(np.asarray(durations) > 0)
    if options.keyframes_only:
        shown = shown[:1]
    chosen = shown[sample(times[shown], end_s, _TICK_S, options, limits)]
    width, height = within(*full, options.max_pixels)
    limits.check_frames(chosen.size, width, height)
    return MediaPlan(
        kind="animation",
        width=width,
        height=height,
        duration_s=end_s,
        fps=len(shown) / end_s,
        times_s=tuple(round(float(time), 9) for time in times[chosen]),
        frame_indices=tuple(chosen.tolist()),
        total_frames=len(durations),
        decoder=f"{describe()} animation of {width}x{height}",
    )


class AnimationReader:
    """An open animation. After a broken frame the rest is lost: later ones paint over it."""

    def __init__(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> None:
        self._plan = plan
        try:
            self._image = Image.open(path, formats=("WEBP",))
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableImage("The animation cannot be read") from error
        limits.check_size(*self._image.size)

    def close(self) -> None:
        self._image.close()

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        for position in sorted(set(wanted)):
            try:
                self._image.seek(self._plan.frame_indices[position])
                pixels = upright_pixels(self._image)
            except (EOFError, OSError, ValueError):
                return
            yield position, resized(pixels, self._plan.width, self._plan.height)


def _durations_ms(path: str | Path, limits: MediaLimits) -> list[int]:
    """How long each frame is shown; a still picture for as long as one frame."""
    durations: list[int] = []
    with open(path, "rb") as file:
        place = _HEAD_BYTES
        for _ in range(limits.max_source_frames):
            file.seek(place)
            header = file.read(_CHUNK.size)
            if len(header) < _CHUNK.size:
                break
            name, size = _CHUNK.unpack(header)
            if name == b"ANMF":
                durations.append(int.from_bytes(file.read(_DURATION.stop)[_DURATION], "little"))
            # chunks begin at even places
            place += _CHUNK.size + size + size % 2
        else:
            raise MediaError(f"Expected at most {limits.max_source_frames} frames in a video, but got more")
    return durations if any(durations) else [_MS_OF_NONE] * max(1, len(durations))
