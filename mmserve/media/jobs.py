"""The decoding process: plans and decodes what it is told to, one job at a time, with few rights.

Imports no torch. Knows nothing about who asks, about deadlines, or what the frames are for.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt

from mmserve.errors import MediaError, MMServeError, Unavailable, WireError
from mmserve.media import backends, confine, framelist
from mmserve.media.animation import AnimationReader, is_webp, plan_animation
from mmserve.media.frames import FramesReader, plan_frames
from mmserve.media.image import decode_image, plan_image
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.protocol import (
    HEADER,
    DecodeMedia,
    DecoderReady,
    Job,
    JobFailed,
    MediaDecoded,
    MediaPlanned,
    PlanMedia,
    Reply,
    StartDecoder,
    body_length,
    pack,
    unpack_job,
)
from mmserve.media.video import plan_video

_OPEN_READERS = 4

log = logging.getLogger(__name__)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer jobs until the pipe closes."""
    start = _next_job(requests)
    if not isinstance(start, StartDecoder):
        raise WireError("Expected the decoder to be started first")
    confine.die_with_parent(start.parent_pid)
    backends.load(start.limits.video_backend)
    confine.limit_resources(start.limits)
    confine.refuse_system_calls()
    av.logging.set_level(None)
    decoder = Decoder(Path(start.directory), start.limits)
    replies.write(pack(DecoderReady()))
    while (job := _next_job(requests)) is not None:
        confine.allow_cpu(start.limits.job_cpu_s)
        replies.write(pack(decoder.answer(job)))


def _next_job(requests: BinaryIO) -> Job | None:
    header = requests.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return unpack_job(requests.read(body_length(header)))


class Decoder:
    """Does jobs. Keeps the last videos open, so that the next segment of one continues where it was."""

    def __init__(self, directory: Path, limits: MediaLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._readers: OrderedDict[tuple[str, MediaPlan], backends.FrameReader] = OrderedDict()

    def answer(self, job: Job) -> Reply:
        try:
            if isinstance(job, PlanMedia):
                return MediaPlanned(plan=self._plan(job))
            if isinstance(job, DecodeMedia):
                return self._decode(job)
            raise WireError("Expected a plan or decode job, but got something else")
        except MMServeError as error:
            return JobFailed(code=error.code, message=error.public_message)
        except MemoryError:
            self._forget_readers()
            return JobFailed(code=MediaError.code, message="The media needs more memory than it may use")
        except Exception as error:
            # libraries raise anything on damaged input; their words stay here
            log.warning("decoding failed: %s", type(error).__name__)
            self._forget_readers()
            return JobFailed(code=MediaError.code, message="The media cannot be decoded")

    def _plan(self, job: PlanMedia) -> MediaPlan:
        if job.ref.modality == "image":
            return plan_image(job.ref.path, self._limits)
        if job.ref.path.endswith(framelist.SUFFIX):
            return plan_frames(job.ref, self._limits)
        if is_webp(job.ref.path):
            return plan_animation(job.ref.path, job.ref.options, self._limits)
        return plan_video(job.ref.path, job.ref.options, self._limits)

    def _decode(self, job: DecodeMedia) -> MediaDecoded:
        plan = job.plan
        wanted = sorted(set(job.positions))
        self._limits.check_size(plan.width, plan.height)
        if wanted and not 0 <= wanted[0] <= wanted[-1] < plan.num_frames:
            raise MediaError(f"Expected positions below {plan.num_frames}, but got others")
        frame_bytes = plan.width * plan.height * 3
        if frame_bytes * len(wanted) > self._limits.max_decoded_bytes:
            raise MediaError(
                f"Expected at most {self._limits.max_decoded_bytes} bytes of frames at once, "
                f"but got {frame_bytes * len(wanted)}"
            )
        began = time.perf_counter()
        decoded: list[int] = []
        if wanted:
            with _FrameFile(self._directory / job.file_name, len(wanted), plan) as file:
                for position, frame in self._frames(job, wanted):
                    file.frames[len(decoded)] = frame
                    decoded.append(position)
        return MediaDecoded(positions=tuple(decoded), decode_ms=(time.perf_counter() - began) * 1e3)

    def _frames(self, job: DecodeMedia, wanted: list[int]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        if job.plan.kind == "image":
            pixels = decode_image(job.ref.path, self._limits)
            if pixels.shape != (job.plan.height, job.plan.width, 3):
                raise MediaError("The image changed between planning and decoding")
            yield 0, pixels
        elif job.plan.kind == "array":
            raise WireError("Expected media to decode, but got an array")
        else:
            yield from self._reader(job).read(wanted)

    def _reader(self, job: DecodeMedia) -> backends.FrameReader:
        key = (job.ref.path, job.plan)
        reader = self._readers.get(key)
        if reader is None:
            reader = _open(job.ref.path, job.plan, self._limits)
            self._readers[key] = reader
            if len(self._readers) > _OPEN_READERS:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(key)
        return reader

    def _forget_readers(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()


def _open(path: str, plan: MediaPlan, limits: MediaLimits) -> backends.FrameReader:
    if plan.kind == "frames":
        return FramesReader(path, plan, limits)
    if plan.kind == "animation":
        return AnimationReader(path, plan, limits)
    return backends.open_reader(path, plan, limits)


class _FrameFile:
    """A new file of frames, mapped for writing. Its space is reserved first, so writing cannot fail."""

    def __init__(self, path: Path, count: int, plan: MediaPlan) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        size = count * plan.height * plan.width * 3
        try:
            os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unavailable("There is no space left for decoded frames") from error
            raise
        self.frames = np.frombuffer(self._map, dtype=np.uint8).reshape(count, plan.height, plan.width, 3)

    def __enter__(self) -> _FrameFile:
        return self

    def __exit__(self, *_: object) -> None:
        del self.frames  # it keeps the map open
        self._map.close()
        os.close(self._fd)
