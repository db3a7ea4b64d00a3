"""Frames by PyAV: one seek per GOP, decoding forward, and knowing which frames are damaged.

Runs inside the decoding sandbox. Knows nothing about sampling, processes or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mmserve.errors import MediaError
from mmserve.media.backends import Frame
from mmserve.media.container import open_container, packets, shown_at
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan

# a seek costs about as much as decoding this many frames
SEEK_COSTS_FRAMES = 3
_NOTED_PACKETS = 256


def describe() -> str:
    return f"pyav {av.__version__} ffmpeg {av.ffmpeg_version_info}"


def open_video(path: str | Path, plan: MediaPlan, limits: MediaLimits) -> VideoReader:
    return VideoReader(path, plan, limits)


class VideoReader:
    """An open video that decodes planned frames. Calls that go forward in time continue where the last ended.

    A frame that is broken, or refers to one that is, counts as lost: a decoder would show an
    invention in its place. Decoding recovers at the next keyframe. Frames are views that stay valid.
    """

    _container: InputContainer
    _run: _Run

    def __init__(self, path: str | Path, plan: MediaPlan, limits: MediaLimits) -> None:
        assert plan.video is not None
        self._path = path
        self._plan = plan
        self._index = plan.video
        self._planned = frozenset(plan.video.pts)
        self._limits = limits
        self._can_seek = True
        self._reformatter = VideoReformatter()
        self._number = 0  # of the newest frame that was asked for
        self._sought = False
        self._open()

    def close(self) -> None:
        self._container.close()

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
        for position in sorted(set(wanted)):
            frame = self._find(position)
            if frame is not None:
                yield position, self._upright(frame)

    def _find(self, position: int) -> VideoFrame | None:
        """The frame shown at exactly the planned time, or None when it is lost."""
        pts = self._index.pts[position]
        if self._is_elsewhere(position):
            self._seek(position)
        frame = self._run.forward_to(pts, is_last=self._can_seek and self._ends_visit(position))
        if frame is None and self._sought and self._run.began_after(pts):
            # the seek landed too late, or on a broken keyframe: go by the file's order from now on
            self._can_seek = False
            self._restart()
            frame = self._run.forward_to(pts)
        self._number = self._plan.frame_indices[position]
        return frame

    def _is_elsewhere(self, position: int) -> bool:
        """Whether to seek. Going on in order costs the frames in between, of this GOP and others."""
        pts, at = self._index.pts[position], self._run.at
        if at is not None and (pts < at or (pts > at and self._run.is_drained)):
            return True
        return self._can_seek and self._is_far(self._number, position)

    def _ends_visit(self, position: int) -> bool:
        """Whether the next planned frame will be sought, so that nothing more of this GOP is needed."""
        after = position + 1
        number = self._plan.frame_indices[position]
        return after == self._plan.num_frames or self._is_far(number, after)

    def _is_far(self, number: int, position: int) -> bool:
        return self._index.gop_start[position] - number > SEEK_COSTS_FRAMES

    def _seek(self, position: int) -> None:
        seek_to = self._index.seek_to[position]
        self._number = self._index.gop_start[position]
        if not self._can_seek or seek_to == self._index.start:
            self._restart()
            return
        try:
            self._container.seek(seek_to, stream=self._stream, backward=True)
        except FFmpegError:
            self._can_seek = False
            self._restart()
            return
        self._run, self._sought = _Run(self._container, self._stream, self._planned), True

    def _restart(self) -> None:
        self._container.close()
        self._open()

    def _open(self) -> None:
        self._container = open_container(self._path)
        stream = self._container.streams[self._index.stream]
        if not isinstance(stream, VideoStream):
            raise MediaError("The video changed between planning and decoding")
        codec = stream.codec_context
        codec.thread_count = self._limits.decode_threads
        codec.thread_type = "AUTO"
        # the header's size was checked, but a stream may change its size later
        codec.options = {"max_pixels": str(self._limits.max_pixels)}
        self._stream = stream
        self._number, self._sought = 0, False
        self._run = _Run(self._container, stream, self._planned)

    def _upright(self, frame: VideoFrame) -> Frame:
        swap, mirror_rows, mirror_columns = self._index.turn
        width, height = self._plan.width, self._plan.height
        if swap:
            width, height = height, width
        # streams may change size on the way: every frame is scaled to the planned size
        is_scaled = (frame.width, frame.height) != (width, height)
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=Interpolation.BICUBIC if is_scaled else None,
            threads=self._limits.decode_threads,
        )
        plane = rgb.planes[0]
        rows: Frame = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(height, plane.line_size)
        pixels = rows[:, : width * 3].reshape(height, width, 3)
        if swap:
            pixels = pixels.transpose(1, 0, 2)
        if mirror_rows:
            pixels = pixels[::-1]
        if mirror_columns:
            pixels = pixels[:, ::-1]
        return pixels


class _Run:
    """Decoding forward from one point of the file, remembering which frames are damaged."""

    def __init__(self, container: InputContainer, stream: VideoStream, planned: frozenset[int]) -> None:
        self.at: int | None = None  # time of the newest decoded frame
        self.is_drained = False  # nothing after `at` will come, though the file may go on
        self._first: int | None = None
        self._held: VideoFrame | None = None  # the frame at `at`, unless damaged
        self._last: int | None = None  # time after which nothing is needed
        self._planned = planned
        # H.264 marks frames that no other frame needs; in other codecs the mark is weaker or absent
        self._skips = stream.codec_context.name == "h264"
        self._frames = self._decode(container, stream)
        self._sent: dict[int, tuple[int, int]] = {}  # pts of packets in flight: GOP, order
        self._broken_from: dict[int, int] = {}  # GOP: order of its first damage
        self._gop_starts: list[int] = []

    def began_after(self, pts: int) -> bool:
        return self._first is None or self._first > pts

    def forward_to(self, pts: int, *, is_last: bool = False) -> VideoFrame | None:
        """Decode up to this time. With `is_last` the decoder gives the frame without seeing what follows."""
        self._last = pts if is_last else None
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
        codec = stream.codec_context
        for order, packet in enumerate(packets(container, stream)):
            gop = self._note(packet, order)
            if self._skips:
                codec.skip_frame = "DEFAULT" if shown_at(packet) in self._planned else "NONREF"
            try:
                frames = packet.decode()
            except FFmpegError:
                self._damage(gop, order)
                continue
            yield from (frame for frame in frames if frame.pts is not None)
            if shown_at(packet) == self._last:
                self.is_drained = True
                break
        try:
            frames = codec.decode(None)
        except FFmpegError:
            return
        yield from (frame for frame in frames if frame.pts is not None)

    def _note(self, packet: Packet[VideoStream], order: int) -> int:
        pts = shown_at(packet)
        if packet.is_keyframe or not self._gop_starts:
            self._gop_starts.append(pts)
        gop = len(self._gop_starts) - 1
        if self.at is not None and len(self._sent) > _NOTED_PACKETS:
            # skipped ones never come out
            self._sent = {time: sent for time, sent in self._sent.items() if time > self.at}
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
