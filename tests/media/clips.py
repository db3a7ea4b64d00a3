"""Media made on the spot: small clips of solid colours whose frames can be told apart."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition
from av.video.stream import VideoStream

from mmserve.request import MediaRef, Modality

Frame = npt.NDArray[np.uint8]


def shade(index: int) -> int:
    """The grey level of frame `index`: neighbours differ by far more than coding noise."""
    return 20 + index * 37 % 200


def picture(index: int, width: int, height: int) -> Frame:
    """Grey of the frame's shade, with a white patch in the upper left corner."""
    frame = np.full((height, width, 3), shade(index), dtype=np.uint8)
    frame[: height // 4, : width // 4] = 255
    return frame


def shade_of(frame: Frame) -> int:
    """The grey level of a decoded frame, read away from the corners."""
    height, width = frame.shape[:2]
    return round(float(frame[height // 2 :, width // 2 :].mean()))


def make_video(
    path: Path,
    *,
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    rate: int = 12,
    codec: str = "libx264",
    gop: int = 8,
    b_frames: int = 0,
    ticks: Sequence[int] | None = None,
    rotation: float = 0,
    hflip: bool = False,
    second: tuple[int, int] | None = None,
) -> Path:
    """Encode `frames` pictures; `ticks` are presentation times in 1/1000 s, else a constant rate."""
    with av.open(path, "w") as container:
        streams = []
        for width, height in (size, second) if second else (size,):
            stream = container.add_stream(codec, rate=rate)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = gop
            if ticks:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            if codec == "libx264":
                stream.options = {"bf": str(b_frames), "sc_threshold": "0", "crf": "18"}
            if rotation or hflip:
                stream.set_display_rotation(rotation, hflip=hflip)
            stream.disposition = Disposition.default  # of both: then the higher bit rate decides
            streams.append((stream, width, height))
        for index in range(frames):
            for stream, width, height in streams:
                frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
                frame.time_base = Fraction(1, 1000) if ticks else Fraction(1, rate)
                frame.pts = ticks[index] if ticks else index
                container.mux(stream.encode(frame))
        for stream, _, _ in streams:
            container.mux(stream.encode())
    return path


def reference(path: Path, modality: Modality = "video") -> MediaRef:
    return MediaRef(modality=modality, path=str(path), digest="0" * 64, source=path.name)


def png_bomb(side: int) -> bytes:
    """A black picture of `side` squared, one bit a pixel: a few kilobytes."""
    row = b"\0" * (1 + (side + 7) // 8)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(row * side, 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
