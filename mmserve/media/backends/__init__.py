"""Who turns planned positions of a video into frames: one library per file, loaded when it is chosen.

The plan, and with it every time, is PyAV's alone. Knows nothing about processes or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan

Frame = npt.NDArray[np.uint8]

_MODULES = {
    "pyav": "mmserve.media.backends.pyav",
    "decord": "mmserve.media.backends.decord",
    "torchcodec": "mmserve.media.backends.torchcodec",
}

# files with an index; in others (MPEG-TS) decord and torchcodec show other frames, or none
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


class Unsuited(Exception):
    """A backend would show this video otherwise than planned; PyAV decodes it instead."""


class FrameReader(Protocol):
    """An open video. Calls that go forward in time continue where the last one ended."""

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        """(position in the plan, upright RGB frame) for each wanted position that decodes, by time."""

    def close(self) -> None: ...


class Backend(Protocol):
    """What the module of a backend has to offer."""

    def describe(self) -> str:
        """Its name and versions: whatever decides about pixels."""

    def open_video(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> FrameReader:
        """Raises `Unsuited` for a video that it cannot show as planned."""


def load(name: str) -> Backend:
    return cast(Backend, import_module(_MODULES[name]))


def describe(name: str) -> str:
    return load(name).describe()


def open_reader(path: str | Path, plan: MediaPlan, limits: MediaLimits) -> FrameReader:
    """The reader of the configured backend, or PyAV's where that one would not do."""
    try:
        return load(limits.video_backend).open_video(path, plan, limits)
    except Unsuited:
        return load("pyav").open_video(path, plan, limits)
