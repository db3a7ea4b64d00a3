"""Videos that come as a list of pictures: plans and frames.

Runs inside the decoding sandbox. Knows nothing about where pictures came from, processes or models.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from mmserve.errors import BadRequest, MediaError
from mmserve.media.framelist import DEFAULT_FPS, Entry, read_index
from mmserve.media.image import UnreadableImage, decode_image, describe, image_size, resized
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MAX_FPS, MediaPlan, check_options, sample, within
from mmserve.request import MediaRef

_TICK_S = 1e-6


def plan_frames(ref: MediaRef, limits: MediaLimits) -> MediaPlan:
    """Read the headers of the pictures that will be used: all, unless the options ask for fewer.

    All are scaled to the size of the first that can be read; those that cannot are lost when decoded.
    """
    options = ref.options
    check_options(options, limits)
    rate = DEFAULT_FPS if ref.array_fps is None else ref.array_fps
    if not 0 < rate <= MAX_FPS:
        raise BadRequest(f"Expected fps of frames above 0 and at most {MAX_FPS:g}, but got {rate:g}")
    with open(ref.path, "rb") as file:
        index = read_index(file, limits)
        if options.num_frames is None and options.fps is None:
            options = msgspec.structs.replace(options, num_frames=len(index))
        times = np.arange(len(index)) / rate
        chosen = sample(times, len(index) / rate, _TICK_S, options, limits)
        sizes = [_size(file, index[number], limits) for number in chosen]
    known = [size for size in sizes if size is not None]
    if not known:
        raise MediaError("Expected frames that can be read, but none of them can")
    pixels = sum(width * height for width, height in known)
    if pixels > limits.max_total_pixels:
        raise MediaError(
            f"Expected at most {limits.max_total_pixels} pixels over all frames, but got {pixels}"
        )
    width, height = within(*known[0], options.max_pixels)
    limits.check_frames(len(chosen), width, height)
    return MediaPlan(
        kind="frames",
        width=width,
        height=height,
        duration_s=len(index) / rate,
        fps=rate,
        times_s=tuple(round(float(time), 9) for time in times[chosen]),
        frame_indices=tuple(chosen.tolist()),
        total_frames=len(index),
        decoder=f"{describe()} frames of {width}x{height}",
    )


class FramesReader:
    """A list of pictures that is open. A picture that cannot be decoded is a lost frame."""

    def __init__(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> None:
        self._plan = plan
        self._limits = limits
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        try:
            self._index = read_index(self._file, limits)
            if len(self._index) != plan.total_frames:
                raise MediaError("The frames changed between planning and decoding")
        except MediaError:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        for position in sorted(set(wanted)):
            entry = self._index[self._plan.frame_indices[position]]
            try:
                pixels = self._pixels(entry)
            except UnreadableImage:
                continue
            yield position, resized(pixels, self._plan.width, self._plan.height)

    def _pixels(self, entry: Entry) -> npt.NDArray[np.uint8]:
        content = _content(self._file, entry)
        if not entry.width:
            return decode_image(io.BytesIO(content), self._limits)
        return np.frombuffer(content, dtype=np.uint8).reshape(entry.height, entry.width, 3)


def _size(file: BinaryIO, entry: Entry, limits: MediaLimits) -> tuple[int, int] | None:
    """The size of a picture by its header; None when it cannot be read."""
    if entry.width:
        limits.check_size(entry.width, entry.height)
        return entry.width, entry.height
    try:
        return image_size(io.BytesIO(_content(file, entry)), limits)
    except UnreadableImage:
        return None


def _content(file: BinaryIO, entry: Entry) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.size)
