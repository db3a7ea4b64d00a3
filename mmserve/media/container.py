"""Opening video files with PyAV: which formats, streams and codecs are let in, and which way is up.

Runs inside the decoding sandbox. Knows nothing about sampling or about who decodes the frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mmserve.errors import MediaError
from mmserve.media.limits import MediaLimits

# how a decoded frame becomes upright: swap its axes, then mirror its rows, then its columns
Turn = tuple[bool, bool, bool]
UPRIGHT: Turn = (False, False, False)

_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,matroska,webm,mpegts,avi,gif"}
_CODECS = frozenset({"h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "gif"}) | {
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "mjpeg",
    "h263",
    "msmpeg4",
    "msmpeg4v2",
}
_PROBED_PACKETS = 64


def open_container(path: str | Path) -> InputContainer:
    try:
        return av.open(f"file:{path}", mode="r", options=dict(_OPEN_OPTIONS))
    except (FFmpegError, ValueError) as error:
        raise MediaError("The file is not a video that can be opened") from error


def best_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise MediaError("The file has no video stream")
    # a stream nobody can decode has no codec context at all
    codec = stream.codec_context
    if codec is None or codec.name not in _CODECS:
        raise MediaError("The video's codec is not supported")
    limits.check_size(codec.width, codec.height)
    if container.duration is not None:
        check_duration(container.duration / av.time_base, limits)
    return stream


def check_duration(duration_s: float, limits: MediaLimits) -> None:
    if duration_s > limits.max_duration_s:
        limit = f"{limits.max_duration_s:g} s"
        raise MediaError(f"Expected a video of at most {limit}, but got {duration_s:.0f} s")


def packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Packets that have a time, until the end or the point where the file is torn."""
    found = container.demux(stream)
    while True:
        try:
            packet = next(found, None)
        except FFmpegError:
            return
        if packet is None:
            return
        if packet.size and (packet.pts is not None or packet.dts is not None):
            yield packet


def shown_at(packet: Packet[VideoStream]) -> int:
    time = packet.dts if packet.pts is None else packet.pts
    assert time is not None
    return time


def probe_turn(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> Turn:
    """How to turn decoded frames upright: the display matrix comes with the first frame that decodes."""
    try:
        container.seek(0, backward=True)
    except FFmpegError:
        return UPRIGHT
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    for count, packet in enumerate(packets(container, stream)):
        try:
            frames = packet.decode()
        except FFmpegError:
            frames = []
        if frames:
            return _turn_of(frames[0])
        if count > _PROBED_PACKETS:
            break
    return UPRIGHT


def is_mirrored(turn: Turn) -> bool:
    """True for turns that no rotation replaces."""
    return sum(turn) % 2 == 1


def _turn_of(frame: VideoFrame) -> Turn:
    # iterates over its items, whatever its type says
    items = cast(Iterable[SideData], frame.side_data)
    matrix = next((item for item in items if item.type == SideDataType.DISPLAYMATRIX), None)
    if matrix is None:
        return UPRIGHT
    # x' = a x + c y, y' = b x + d y, with x to the right and y down
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32, count=5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
