"""Pictures that are the frames of one video, in one file: an index, then one picture after the other.

Knows nothing about decoding: the API process writes these files, the decoding process reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from mmserve.errors import BadRequest, MediaError
from mmserve.media.limits import MediaLimits
from mmserve.media.store import ContentStore, StoredFile
from mmserve.request import MediaOptions, MediaRef

SUFFIX = ".framelist"
# of frames whose sender does not say, which only reports and models with a sense of time notice
DEFAULT_FPS = 2.0
_HEADER = struct.Struct("<8sI")
_MAGIC = b"mmframe1"
_ENTRY = struct.Struct("<IIQ")

# an image file by its path or its content, or pixels [H, W, 3]
Picture = Path | bytes | npt.NDArray[np.uint8]


class Entry(NamedTuple):
    """Where a picture lies. With a width and a height it is RGB pixels, without an image file."""

    width: int
    height: int
    offset: int
    size: int


def save_pictures(pictures: Sequence[Picture], store: ContentStore, limits: MediaLimits) -> StoredFile:
    """Store pictures in their order; the caller holds the file. Pixels need no limit: they are here."""
    if not pictures:
        raise BadRequest("Expected a video of at least one frame, but got none")
    check_count(len(pictures), limits)
    sizes = [_measured(picture) for picture in pictures]
    encoded = sum(size for width, _, size in sizes if width == 0)
    if encoded > limits.max_video_bytes:
        raise MediaError(f"Expected at most {limits.max_video_bytes} bytes of frames, but got {encoded}")
    total = _HEADER.size + sum(_ENTRY.size + size for _, _, size in sizes)
    with store.incoming(total, expected=total) as file:
        file.write(_HEADER.pack(_MAGIC, len(pictures)))
        file.write(b"".join(_ENTRY.pack(*size) for size in sizes))
        for picture in pictures:
            file.write(_content(picture))
        return file.finish(SUFFIX)


def check_count(count: int, limits: MediaLimits) -> None:
    if count > limits.max_frames:
        raise MediaError(f"Expected at most {limits.max_frames} frames in a list, but got {count}")


def frames_media(
    stored: StoredFile, source: str, options: MediaOptions | None = None, fps: float | None = None
) -> MediaRef:
    """Refer to stored pictures. The `fps` of `options` is their rate unless they bring one, as in vLLM."""
    options = options or MediaOptions()
    if fps is None and options.fps is not None:
        fps, options = options.fps, msgspec.structs.replace(options, fps=None)
    return MediaRef(
        modality="video",
        path=str(stored.path),
        digest=stored.digest,
        source=source,
        options=options,
        array_fps=fps or DEFAULT_FPS,
    )


def read_index(file: BinaryIO, limits: MediaLimits) -> list[Entry]:
    """The pictures of a file, checked to lie inside it."""
    broken = MediaError("The file is not a list of frames")
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise broken
    magic, count = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise broken
    check_count(count, limits)
    index = file.read(count * _ENTRY.size)
    end = file.seek(0, 2)
    if len(index) < count * _ENTRY.size:
        raise broken
    entries: list[Entry] = []
    offset = _HEADER.size + len(index)
    for width, height, size in _ENTRY.iter_unpack(index):
        if size > end - offset or (width and size != width * height * 3):
            raise broken
        entries.append(Entry(width, height, offset, size))
        offset += size
    return entries


def _measured(picture: Picture) -> tuple[int, int, int]:
    """Width and height of pixels, else zeros; bytes."""
    if isinstance(picture, Path):
        return 0, 0, picture.stat().st_size
    if isinstance(picture, bytes):
        return 0, 0, len(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        found = f"{picture.dtype} {list(picture.shape)}"
        raise BadRequest(f"Expected frames as uint8 pixels of shape [H, W, 3], but got {found}")
    height, width, _ = picture.shape
    return width, height, picture.size


def _content(picture: Picture) -> bytes:
    if isinstance(picture, Path):
        return picture.read_bytes()
    return picture if isinstance(picture, bytes) else picture.tobytes()
