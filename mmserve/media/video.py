"""Video files by PyAV: an index made by demuxing, and exact frames by one seek per GOP.

Runs inside the decoding sandbox. Knows nothing about processes, deadlines or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
import numpy.typing as npt
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
from mmserve.media.plan import MediaPlan, VideoIndex, VideoPlan, check_options, sample
from mmserve.request import MediaOptions

Frame = npt.NDArray[np.uint8]
Ticks = npt.NDArray[np.int64]
Turn = tuple[bool, bool, bool]

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
_UPRIGHT: Turn = (False, False, False)
_PROBED_PACKETS = 64


def plan_video(path: str | Path, options: MediaOptions, limits: MediaLimits) -> VideoPlan:
    """Decide which frames will be sampled. Only the first frame is decoded, for its orientation."""
    check_options(options, limits)
    with _open(path) as container:
        stream = _best_stream(container, limits)
        index = _demux_index(container, stream, limits)
        tick = float(stream.time_base or Fraction(1, 90_000))
        first_s = float(index.pts[0] * tick)
        started = container.start_time
        zero_s = first_s if started is None else min(first_s, started / av.time_base)
        times: npt.NDArray[np.float64] = index.pts.astype(np.float64) * tick - zero_s
        end_s = max(index.end_pts * tick - zero_s, float(times[-1]))
        _check_duration(end_s, limits)
        chosen = sample(times, end_s, tick, options, limits)
        turn = _probe_turn(container, stream, limits)
        width, height = stream.codec_context.width, stream.codec_context.height
        if turn[0]:
            width, height = height, width
        limits.check_frames(chosen.size, width, height)
        duration_s = end_s - float(times[0])
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else (index.pts.size / duration_s if duration_s > 0 else 0.0)
        return MediaPlan(
            kind="video",
            width=width,
            height=height,
            duration_s=round(duration_s, 9),
            fps=fps,
            times_s=tuple(round(float(time), 9) for time in times[chosen]),
            frame_indices=tuple(chosen.tolist()),
            total_frames=index.pts.size,
            decoder=f"pyav {av.__version__} ffmpeg {av.ffmpeg_version_info} stream {stream.index}",
            video=VideoIndex(
                stream=stream.index,
                start=int(index.seek_to[0]),
                turn=turn,
                pts=tuple(index.pts[chosen].tolist()),
                seek_to=tuple(index.seek_to[chosen].tolist()),
            ),
        )


def decode_frames(
    path: str | Path, plan: VideoPlan, wanted: Sequence[int], limits: MediaLimits | None = None
) -> Iterator[tuple[int, Frame]]:
    """Yield (position in the plan, upright RGB frame) for each wanted position that decodes, by time."""
    reader = VideoReader(path, plan, limits or MediaLimits())
    try:
        yield from reader.read(wanted)
    finally:
        reader.close()


class VideoReader:
    """An open video that decodes planned frames. Calls that go forward in time continue where the last ended.

    A frame that is broken, or refers to one that is, counts as lost: a decoder would show an
    invention in its place. Decoding recovers at the next keyframe.
    """

    def __init__(self, path: str | Path, plan: VideoPlan, limits: MediaLimits) -> None:
        assert plan.video is not None
        self._path = path
        self._plan = plan
        self._index = plan.video
        self._limits = limits
        self._can_seek = True
        self._open()

    def close(self) -> None:
        self._container.close()

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        for position in sorted(set(wanted)):
            frame = self._find(self._index.pts[position], self._index.seek_to[position])
            if frame is not None:
                yield position, self._upright(frame)

    def _find(self, pts: int, seek_to: int) -> VideoFrame | None:
        """The frame shown at exactly `pts`, or None when it is lost."""
        is_behind = self._run.at is not None and pts < self._run.at
        if is_behind or (self._can_seek and seek_to != self._run_from):
            self._seek(seek_to)
        frame = self._run.forward_to(pts)
        sought = self._can_seek and self._run_from != self._index.start
        if frame is None and sought and self._run.began_after(pts):
            # the seek landed too late, or on a broken keyframe: go by the file's order from now on
            self._can_seek = False
            self._restart()
            frame = self._run.forward_to(pts)
        return frame

    def _seek(self, seek_to: int) -> None:
        if not self._can_seek or seek_to == self._index.start:
            self._restart()
            return
        try:
            self._container.seek(seek_to, stream=self._stream, backward=True)
        except FFmpegError:
            self._can_seek = False
            self._restart()
            return
        self._run, self._run_from = _Run(self._container, self._stream), seek_to

    def _restart(self) -> None:
        self._container.close()
        self._open()

    def _open(self) -> None:
        self._container = _open(self._path)
        stream = self._container.streams[self._index.stream]
        if not isinstance(stream, VideoStream):
            raise MediaError("The video changed between planning and decoding")
        _configure(stream, self._limits)
        self._stream = stream
        self._run, self._run_from = _Run(self._container, stream), self._index.start

    def _upright(self, frame: VideoFrame) -> Frame:
        swap, mirror_rows, mirror_columns = self._index.turn
        width, height = self._plan.width, self._plan.height
        if swap:
            width, height = height, width
        # streams may change size on the way: every frame is scaled to the planned size
        pixels = np.asarray(frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
        if swap:
            pixels = pixels.transpose(1, 0, 2)
        if mirror_rows:
            pixels = pixels[::-1]
        if mirror_columns:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels, dtype=np.uint8)


class _Run:
    """Decoding forward from one point of the file, remembering which frames are damaged."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.at: int | None = None  # time of the newest decoded frame
        self._first: int | None = None
        self._held: VideoFrame | None = None  # the frame at `at`, unless damaged
        self._frames = self._decode(container, stream)
        self._sent: dict[int, tuple[int, int]] = {}  # pts of packets in flight: GOP, order
        self._broken_from: dict[int, int] = {}  # GOP: order of its first damage
        self._gop_starts: list[int] = []

    def began_after(self, pts: int) -> bool:
        return self._first is None or self._first > pts

    def forward_to(self, pts: int) -> VideoFrame | None:
        while self.at is None or self.at < pts:
            frame = next(self._frames, None)
            if frame is None:
                return None
            assert frame.pts is not None
            self._held = None if self._is_damaged(frame) else frame
            self.at = frame.pts
            if self._first is None:
                self._first = frame.pts
        return self._held if self.at == pts else None

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        for order, packet in enumerate(_packets(container, stream)):
            gop = self._note(packet, order)
            try:
                frames = packet.decode()
            except FFmpegError:
                self._damage(gop, order)
                continue
            yield from (frame for frame in frames if frame.pts is not None)
        try:
            frames = stream.codec_context.decode(None)
        except FFmpegError:
            return
        yield from (frame for frame in frames if frame.pts is not None)

    def _note(self, packet: Packet[VideoStream], order: int) -> int:
        pts = _shown_at(packet)
        if packet.is_keyframe or not self._gop_starts:
            self._gop_starts.append(pts)
        gop = len(self._gop_starts) - 1
        self._sent[pts] = (gop, order)
        if packet.is_corrupt:
            self._damage(gop, order)
        return gop

    def _damage(self, gop: int, order: int) -> None:
        self._broken_from[gop] = min(order, self._broken_from.get(gop, order))

    def _is_damaged(self, frame: VideoFrame) -> bool:
        assert frame.pts is not None
        gop, order = self._sent.pop(frame.pts, (0, 0))
        leads = frame.pts < self._gop_starts[gop]  # shown before its keyframe: refers to the GOP before
        if leads and gop == 0:
            return True  # what it refers to was not decoded in this run; no reason to blame the GOP
        if frame.is_corrupt:
            self._damage(gop, order)
        return self._broken_from.get(gop, order + 1) <= order or (leads and gop - 1 in self._broken_from)


class _Index(NamedTuple):
    """Every frame of a stream in order of presentation, with where to seek for it."""

    pts: Ticks
    seek_to: Ticks
    end_pts: int


def _demux_index(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> _Index:
    pts: list[int] = []
    keys: list[tuple[int, int]] = []
    end = 0
    # Matroska seeks by presentation time, the others by decoding time
    by_pts = "matroska" in container.format.name
    for packet in _packets(container, stream):
        if packet.is_discard:
            continue
        shown_at = _shown_at(packet)
        pts.append(shown_at)
        end = max(end, shown_at + (packet.duration or 0))
        if packet.is_keyframe:
            keys.append((shown_at, shown_at if by_pts or packet.dts is None else packet.dts))
        if len(pts) > limits.max_source_frames:
            raise MediaError(f"Expected at most {limits.max_source_frames} frames in a video, but got more")
    if not pts:
        raise MediaError("The video has no frames")
    shown = np.unique(np.asarray(pts, dtype=np.int64))
    if container.format.name == "gif":
        keys = keys[:1]  # frames are marked as keys but paint over the ones before
    key_pts, key_seek = np.asarray(sorted(keys) or [(pts[0], pts[0])], dtype=np.int64).T
    return _Index(shown, key_seek[np.maximum(np.searchsorted(key_pts, shown, side="right") - 1, 0)], end)


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Packets that have a time, until the end or the point where the file is torn."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            return
        if packet is None:
            return
        if packet.size and (packet.pts is not None or packet.dts is not None):
            yield packet


def _shown_at(packet: Packet[VideoStream]) -> int:
    time = packet.dts if packet.pts is None else packet.pts
    assert time is not None
    return time


def _open(path: str | Path) -> InputContainer:
    try:
        return av.open(f"file:{path}", mode="r", options=dict(_OPEN_OPTIONS))
    except (FFmpegError, ValueError) as error:
        raise MediaError("The file is not a video that can be opened") from error


def _best_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise MediaError("The file has no video stream")
    # a stream nobody can decode has no codec context at all
    codec = stream.codec_context
    if codec is None or codec.name not in _CODECS:
        raise MediaError("The video's codec is not supported")
    limits.check_size(codec.width, codec.height)
    if container.duration is not None:
        _check_duration(container.duration / av.time_base, limits)
    return stream


def _check_duration(duration_s: float, limits: MediaLimits) -> None:
    if duration_s > limits.max_duration_s:
        limit = f"{limits.max_duration_s:g} s"
        raise MediaError(f"Expected a video of at most {limit}, but got {duration_s:.0f} s")


def _configure(stream: VideoStream, limits: MediaLimits) -> None:
    stream.codec_context.thread_count = limits.decode_threads
    stream.codec_context.thread_type = "AUTO"
    # the header's size was checked, but a stream may change its size later
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}


def _probe_turn(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> Turn:
    """How to turn decoded frames upright: the display matrix comes with the first frame that decodes."""
    try:
        container.seek(0, backward=True)
    except FFmpegError:
        return _UPRIGHT
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    for count, packet in enumerate(_packets(container, stream)):
        try:
            frames = packet.decode()
        except FFmpegError:
            frames = []
        if frames:
            return _turn_of(frames[0])
        if count > _PROBED_PACKETS:
            break
    return _UPRIGHT


def _turn_of(frame: VideoFrame) -> Turn:
    # iterates over its items, whatever its type says
    items = cast(Iterable[SideData], frame.side_data)
    matrix = next((item for item in items if item.type == SideDataType.DISPLAYMATRIX), None)
    if matrix is None:
        return _UPRIGHT
    # x' = a x + c y, y' = b x + d y, with x to the right and y down
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32, count=5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
