"""The encode role: media items in, their reduced embeddings under leases out, part by part.

Several items are in progress at once. The tower looks at crops of any of them together, up to a budget;
long items and short ones take turns, so that an image does not wait for an hour of video. What comes from
the file of an item in progress waits for it, and finds its frames in the cache. Knows nothing about what an
item consists of.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.encoders.base import Features
from mmserve.pruning.carriers import SemanticCarriers
from mmserve.request import MediaRef
from mmserve.transfer import LeaseReader
from mmserve.workers.items import Clock, ImageWork, ItemWork, Known, Tools
from mmserve.workers.loop import failed
from mmserve.workers.videos import FramesWork, VideoWork

MAX_QUEUED = 32
OPENED_PER_STEP = 4
MAX_AHEAD = 2  # long items that decode: while the tower looks at one, the next is prepared
MAX_PLANNED = 1 << 18  # frames of the plans that are remembered, about 200 bytes each
PLAN_COST = 16  # frames that the rest of a plan weighs
COUNT_S = 0.25  # between reports of a worker that is busy
STEP_BOUND_S = 120.0  # longest silence: some items are opened, one segment is decoded and encoded
SHORT_CROPS = 8  # videos with at most so many frames to encode do not wait for longer ones, nor do images
CROPS_PER_BATCH = {"cpu": 8, "cuda": 64}


@dataclass(slots=True, eq=False)
class _Job:
    command: m.EncodeMedia | m.EncodeFrames
    received_at: float
    work: ItemWork | None = None  # once it is open
    pixels: Tensor | None = None  # what the tower is to see next
    followers: list[_Job] = field(default_factory=list)  # that may share its frames

    @property
    def flight(self) -> tuple[object, ...]:
        """Equal where frames may be shared: one goes first, the others find its frames in the cache."""
        command, media = self.command, self.command.media
        if isinstance(command, m.EncodeFrames):
            return command.request_id, command.item
        is_tiled = media.modality == "image" and command.is_only_image
        return media.digest, media.modality, is_tiled, command.salt


def _opened(media: MediaRef) -> tuple[object, ...]:
    """What a plan depends on."""
    return media.digest, media.options, media.modality, media.array_fps


class EncodeHandler:
    """Items that wait, and those in progress; each `step` opens some and lets the tower look once."""

    roles: tuple[m.Role, ...] = (m.Role.ENCODE,)
    capacity = m.Credits(requests=MAX_QUEUED)

    def __init__(self, tools: Tools, reader: LeaseReader) -> None:
        self._tools = tools
        self._reader = reader
        self._waiting: deque[_Job] = deque()
        self._short: list[_Job] = []
        self._long: list[_Job] = []
        self._news: list[m.AwaitFrames | m.TakeFrames] = []  # of other workers that help with an item
        self._flights: dict[tuple[object, ...], _Job] = {}
        self._known: OrderedDict[tuple[object, ...], Known] = OrderedDict()
        self._planned = 0  # what they weigh
        self._done: Counter[str] = Counter()
        self._told: m.WorkCounted | None = None
        self._told_at = 0.0
        self._was_busy = False
        self._is_long_first = False
        self._budget = CROPS_PER_BATCH[tools.vision.newline.device.type]

    def credits(self) -> m.Credits:
        """Who only waits for another's frames takes no place."""
        return m.Credits(requests=MAX_QUEUED - len(self._waiting) - len(self._short) - len(self._long))

    def handle(self, command: m.AnyCommand) -> None:
        if isinstance(command, m.EncodeMedia | m.EncodeFrames):
            self._waiting.append(_Job(command, time.perf_counter()))
        elif isinstance(command, m.AwaitFrames | m.TakeFrames):
            self._news.append(command)
        elif isinstance(command, m.CancelRequest):
            self._cancel(command.request_id)
        elif isinstance(command, m.ReleaseLease):
            self._tools.leases.release(command.lease_id)

    def _cancel(self, request_id: str) -> None:
        self._waiting = deque(job for job in self._waiting if job.command.request_id != request_id)
        for job in [*self._short, *self._long]:
            job.followers = [one for one in job.followers if one.command.request_id != request_id]
            if job.command.request_id == request_id:
                self._end(job)

    @torch.inference_mode()
    def step(self) -> bool:
        while self._news:
            self._hear(self._news.pop(0))
        for _ in range(min(len(self._waiting), OPENED_PER_STEP)):
            self._open_next()
        batch = self._batch()
        if batch:
            self._look(batch)
        self._is_long_first = not self._is_long_first
        is_busy = bool(self._waiting) or any(map(_has_work, [*self._short, *self._long]))
        if (self._was_busy and not is_busy) or time.monotonic() - self._told_at >= COUNT_S:
            self._tell_counts()
        self._was_busy = is_busy
        return is_busy

    def _tell_counts(self) -> None:
        """Say what was done and what is held, where that has changed."""
        self._told_at = time.monotonic()
        decoded, decoding = self._tools.sandbox.counts()
        cached, held = self._tools.cache.counts()
        open_jobs = len(self._short) + len(self._long)
        followers = sum(len(job.followers) for job in (*self._short, *self._long))
        now = {"items_waiting": len(self._waiting) + followers, "items_open": open_jobs, **decoding, **held}
        counted = m.WorkCounted(totals={**self._done, **decoded, **cached}, now=now)
        if counted != self._told:
            self._told = counted
            self._tools.reporter.emit(counted)

    # help from others

    def _hear(self, news: m.AwaitFrames | m.TakeFrames) -> None:
        """Of an item that is over, or of an earlier attempt, nothing is wanted."""
        for job in [*self._short, *self._long]:
            own, work = job.command, job.work
            if (own.request_id, own.attempt, own.item) != (news.request_id, news.attempt, news.item):
                continue
            if not isinstance(work, VideoWork):
                continue
            self._tools.reporter.announce((own.request_id,), STEP_BOUND_S)
            try:
                if isinstance(news, m.AwaitFrames):
                    work.leave(news.positions)
                else:
                    work.arrive(news.frames, self._reader)
            except Exception as error:  # one item must not end the worker; it is logged and answered
                self._fail(job, error)
                continue
            if not work.missing and job.pixels is None:
                self._advance(job)

    # from waiting to open

    def _open_next(self) -> None:
        """Open what has waited longest, unless something of the same file is in progress."""
        job = self._waiting.popleft()
        if (leader := self._flights.get(job.flight)) is not None:
            leader.followers.append(job)
            return
        command = job.command
        self._tools.reporter.announce((command.request_id,), STEP_BOUND_S)
        clock = Clock()
        clock.add("queue", (time.perf_counter() - job.received_at) * 1e3)
        self._flights[job.flight] = job
        try:
            with clock.measure("decode"):
                known = self._plan(command.media)
            if isinstance(command, m.EncodeFrames):
                job.work = FramesWork(command, known, self._tools, clock)
            else:
                job.work = _open_item(command, known, self._tools, clock)
        except Exception as error:  # one item must not end the worker; it is logged and answered
            self._fail(job, error)
            return
        is_short = command.media.modality == "image" or job.work.crops <= SHORT_CROPS
        lane = self._short if is_short else self._long
        lane.append(job)
        if isinstance(job.work, ImageWork | VideoWork):
            self._done["items_encoded" if job.work.crops else "items_cached"] += 1
        if isinstance(job.work, VideoWork) and len(lane) > MAX_AHEAD:
            job.work.set_aside()

    def _plan(self, media: MediaRef) -> Known:
        """The item's plan, demuxed at most once while it is remembered."""
        name = _opened(media)
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = Known(self._tools.sandbox.plan(media))
            self._planned += PLAN_COST + known.plan.num_frames
            while self._planned > MAX_PLANNED and len(self._known) > 1:
                _, forgotten = self._known.popitem(last=False)
                self._planned -= PLAN_COST + forgotten.plan.num_frames
        self._known.move_to_end(name)
        return known

    # the tower

    def _batch(self) -> list[_Job]:
        """Jobs with pixels for the tower, as many as fit. Waits for a decoder only when there are none."""
        batch: list[_Job] = []
        left = self._budget
        decoding = list(filter(_has_work, self._long))[:MAX_AHEAD]
        short = list(filter(_has_work, self._short))
        jobs = [*decoding, *short] if self._is_long_first else [*short, *decoding]
        ready = [job for job in jobs if job.pixels is not None or self._is_ready(job)]
        alive = [job for job in jobs if self._flights.get(job.flight) is job]  # asking may have ended one
        if alive and not ready:
            self._wait(alive[0])
        for job in ready:
            if job.pixels is None:
                self._advance(job)
            if job.pixels is not None and (len(job.pixels) <= left or not batch):
                batch.append(job)
                left -= len(job.pixels)
            if left <= 0:
                break
        return batch

    def _is_ready(self, job: _Job) -> bool:
        """Asking begins its decoding."""
        try:
            return _work(job).is_ready()
        except Exception as error:  # one item must not end the worker; it is logged and answered
            self._fail(job, error)
            return False

    def _wait(self, job: _Job) -> None:
        self._tools.reporter.announce((job.command.request_id,), STEP_BOUND_S)
        _work(job).wait()

    def _advance(self, job: _Job) -> None:
        """Get a job's next pixels; without any it is over."""
        self._tools.reporter.announce((job.command.request_id,), STEP_BOUND_S)
        try:
            job.pixels = _work(job).pixels()
        except Exception as error:  # one item must not end the worker; it is logged and answered
            self._fail(job, error)
            return
        if job.pixels is None and not _work(job).is_idle():
            self._end(job)

    def _look(self, batch: list[_Job]) -> None:
        self._tools.reporter.announce(tuple(job.command.request_id for job in batch), STEP_BOUND_S)
        pixels = [job.pixels for job in batch if job.pixels is not None]
        started_at = time.perf_counter()
        try:
            features = self._tools.vision.features(pixels[0] if len(pixels) == 1 else torch.cat(pixels))
        except Exception as error:  # a bad step must not end the worker; it is logged and answered
            for job in batch:
                self._fail(job, error)
            return
        spent_ms = (time.perf_counter() - started_at) * 1e3
        self._done["crops_encoded"] += len(features.saliency)
        first = 0
        for job, crops in zip(batch, map(len, pixels), strict=True):
            _work(job).clock.add("encode", spent_ms * crops / len(features.saliency))
            self._take(job, Features(*(part[first : first + crops] for part in features)))
            first += crops

    def _take(self, job: _Job, features: Features) -> None:
        job.pixels = None
        try:
            _work(job).take(features)
        except Exception as error:  # one item must not end the worker; it is logged and answered
            self._fail(job, error)

    # the end

    def _fail(self, job: _Job, error: Exception) -> None:
        self._end(job)
        command = job.command
        self._tools.reporter.emit(failed(command.request_id, command.attempt, error, "encoding its media"))

    def _end(self, job: _Job) -> None:
        """Forget a job; who waited for it goes on, before all others."""
        if job.work is not None:
            job.work.close()
        del self._flights[job.flight]
        for lane in (self._short, self._long):
            if job in lane:
                lane.remove(job)
        self._waiting.extendleft(reversed(job.followers))


def _has_work(job: _Job) -> bool:
    """Whether this worker has anything to do for it."""
    return job.pixels is not None or not _work(job).is_idle()


def _work(job: _Job) -> ItemWork:
    assert job.work is not None, "an open job has its work"
    return job.work


def _open_item(command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> ItemWork:
    """Begin an item, and say what is to be expected of it."""
    work: ImageWork | VideoWork
    lasting, frame_rows = None, 0
    if command.media.modality == "image":
        work = ImageWork(command, known, tools, clock)
        bound = work.tokens
        missing: tuple[int, ...] = ()
    else:
        work = VideoWork(command, known, tools, clock)
        pruner, frames = work.pruner, known.plan.num_frames
        bound = pruner.plan(frames, tools.geometry.frame_tokens) + 1
        if isinstance(pruner, SemanticCarriers):
            lasting, frame_rows = pruner.lasting(frames) + 1, tools.geometry.frame_tokens
        missing = tuple(sorted(work.missing))
    tools.reporter.emit(
        m.MediaPlanned(
            request_id=command.request_id,
            attempt=command.attempt,
            item=command.item,
            keep_bound=bound,
            lasting_bound=lasting,
            frame_rows=frame_rows,
            missing=missing,
        )
    )
    return work
