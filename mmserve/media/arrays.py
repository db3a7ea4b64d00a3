"""Frames that arrive as arrays: uint8 [T, H, W, 3] in a `.npy` file, taken as sampled.

Knows nothing about codecs. Files are mapped, never unpickled.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mmserve.errors import BadRequest, MediaError
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.store import ContentStore
from mmserve.request import MediaRef

Frames = npt.NDArray[np.uint8]
SUFFIX = ".npy"


def save_frames(
    frames: Frames, store: ContentStore, modality: Literal["image", "video"], fps: float | None = None
) -> MediaRef:
    """Store an image [H, W, 3] or frames [T, H, W, 3] and refer to them; the caller holds the file."""
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] != 3 or frames.size == 0:
        found = f"{frames.dtype} {list(frames.shape)}"
        raise BadRequest(f"Expected uint8 pixels of shape [H, W, 3] or [T, H, W, 3], but got {found}")
    if modality == "image" and frames.ndim == 4 and len(frames) != 1:
        raise BadRequest(f"Expected one picture, but got {len(frames)}")
    if modality == "video" and not (fps is not None and 0 < fps < math.inf):
        raise BadRequest(f"Expected fps above 0 with an array of frames, but got {fps}")
    stacked = frames if frames.ndim == 4 else frames[None]
    # it is in memory already, so its size needs no limit
    with store.incoming(sys.maxsize) as file:
        np.save(file, np.ascontiguousarray(stacked), allow_pickle=False)
        stored = file.finish(SUFFIX)
    return MediaRef(
        modality=modality,
        path=str(stored.path),
        digest=stored.digest,
        source="array",
        array_fps=fps if modality == "video" else None,
    )


def open_frames(path: str | Path, limits: MediaLimits) -> Frames:
    """Map a file of frames, checked for type, shape and limits. The view is read-only."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MediaError("The file is not an array of frames") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[3:] != (3,):
        raise MediaError("Expected an array of uint8 frames of shape [T, H, W, 3], but got something else")
    count, height, width, _ = array.shape
    if count == 0:
        raise MediaError("Expected at least one frame, but got none")
    limits.check_size(width, height)
    limits.check_frames(count, width, height)
    return array


def plan_array(ref: MediaRef, limits: MediaLimits) -> MediaPlan:
    frames = open_frames(ref.path, limits)
    count, height, width, _ = frames.shape
    fps = ref.array_fps or 0.0
    if ref.modality == "video" and not 0 < fps < math.inf:
        raise BadRequest(f"Expected fps above 0 with an array of frames, but got {ref.array_fps}")
    if ref.modality == "image" and count != 1:
        raise MediaError(f"Expected one picture, but got {count}")
    times = (0.0,) if ref.modality == "image" else tuple(round(index / fps, 9) for index in range(count))
    return MediaPlan(
        kind="array",
        width=width,
        height=height,
        duration_s=count / fps if fps else 0.0,
        fps=fps,
        times_s=times,
        frame_indices=tuple(range(count)),
        total_frames=count,
        decoder="array",
    )
