"""The encode role: one media item in, reduced embeddings under a lease out.

Decode happens in a sandbox process, in segments of up to 8 frames; frames seen before come from the
embedding cache. Items are taken one after another, so identical media in flight are encoded once.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

import torch

from mmserve import messages as m
from mmserve.encoders.base import VisionEncoder
from mmserve.encoders.cache import EmbeddingCache, Entry
from mmserve.errors import MediaError
from mmserve.media.digest import frame_key
from mmserve.media.plan import MediaPlan
from mmserve.media.preprocess import Preprocessing, image_pixels, video_pixels
from mmserve.media.sandbox import Sandbox
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.pruning.base import Pruner, VisualItem, make_pruner
from mmserve.request import MediaRef, MediaReport, Methods
from mmserve.tensors import to_numpy
from mmserve.transfer import LeaseStore
from mmserve.workers.loop import Reporter, failed

SEGMENT_FRAMES = 8
MAX_QUEUED = 32
MAX_PLANS = 1024
STEP_BOUND_S = 120.0  # longest silence while one item is encoded
LEASE_TTL_S = 86_400.0  # the dispatcher releases leases; this is for those it forgets


@dataclass(slots=True)
class _Known:
    """An item that was opened before: its plan and the frames that turned out not to decode."""

    plan: MediaPlan
    lost: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Clock:
    """Milliseconds per stage of one item."""

    spent: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


class EncodeHandler:
    """Queue of items; each `step` encodes one."""

    roles: tuple[m.Role, ...] = (m.Role.ENCODE,)
    capacity = m.Credits(requests=MAX_QUEUED)

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        geometry: Geometry,
        preprocessing: Preprocessing,
        weights_revision: str,
        sandbox: Sandbox,
        cache: EmbeddingCache,
        leases: LeaseStore,
        reporter: Reporter,
    ) -> None:
        self._vision = vision
        self._geometry = geometry
        self._preprocessing = preprocessing
        self._weights_revision = weights_revision
        self._sandbox = sandbox
        self._cache = cache
        self._leases = leases
        self._reporter = reporter
        self._queue: deque[tuple[m.EncodeMedia, float]] = deque()
        self._known: OrderedDict[tuple[object, ...], _Known] = OrderedDict()

    def credits(self) -> m.Credits:
        return m.Credits(requests=MAX_QUEUED - len(self._queue))

    def handle(self, command: m.AnyCommand) -> None:
        if isinstance(command, m.EncodeMedia):
            self._queue.append((command, time.perf_counter()))
        elif isinstance(command, m.CancelRequest):
            self._queue = deque(job for job in self._queue if job[0].request_id != command.request_id)
        elif isinstance(command, m.ReleaseLease):
            self._leases.release(command.lease_id)

    def step(self) -> bool:
        if not self._queue:
            return False
        command, received_at = self._queue.popleft()
        self._reporter.announce((command.request_id,), STEP_BOUND_S)
        queued_ms = (time.perf_counter() - received_at) * 1e3
        try:
            event: m.AnyEvent = self._encode(command, queued_ms)
        except Exception as error:  # one item must not end the worker; it is logged and answered
            event = failed(command.request_id, command.attempt, error, "encoding its media")
        self._reporter.emit(event)
        return bool(self._queue)

    @torch.inference_mode()
    def _encode(self, command: m.EncodeMedia, queued_ms: float) -> m.MediaEncoded:
        clock = _Clock()
        known = self._open(command)
        clock.lap("decode")
        if command.media.modality == "image":
            item, cached, keys = self._image(command, known, clock)
            newline = 0
        else:
            item, cached, keys = self._video(command, known, clock)
            newline = 1
        reduced = _pruner(command.methods.prune, command.methods.keep).reduce(item)
        embeddings, source = reduced.embeddings, reduced.source
        tokens = item.embeddings.shape[0] * item.embeddings.shape[1]
        if newline:  # ends every video, is never reduced
            embeddings = torch.cat([embeddings, self._vision.newline[None]])
            source = torch.cat([source, source.new_tensor([tokens])])
        clock.lap("prune")
        lease = self._leases.publish(
            {"embeddings": to_numpy(embeddings), "source": source.to(torch.int32).cpu().numpy()},
            ttl_s=LEASE_TTL_S,
            owner=command.request_id,
        )
        clock.lap("publish")
        times = m.EncodeTimes(
            queue=queued_ms,
            **{
                name: clock.spent.get(name, 0.0)
                for name in ("decode", "preprocess", "encode", "prune", "publish")
            },
        )
        return m.MediaEncoded(
            request_id=command.request_id,
            attempt=command.attempt,
            item=command.item,
            encoded=m.EncodedItem(
                lease=lease, tokens=tokens + newline, kept=len(source), key=_item_key(keys, command.methods)
            ),
            cached_tokens=cached,
            report=_report(command.media, known),
            times=times,
        )

    def _open(self, command: m.EncodeMedia) -> _Known:
        """The item's plan, demuxed at most once, announced to the dispatcher."""
        media = command.media
        name = (media.digest, media.options, media.modality, media.array_fps)
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = _Known(self._sandbox.plan(media))
            if len(self._known) > MAX_PLANS:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        plan, geometry = known.plan, self._geometry
        if media.modality == "image":
            tokens = bound = geometry.image_tokens(plan.height, plan.width, 1 if command.is_only_image else 2)
        else:
            tokens = geometry.video_tokens(plan.num_frames)
            pruner = _pruner(command.methods.prune, command.methods.keep)
            bound = pruner.plan(plan.num_frames, geometry.frame_tokens) + 1
        self._reporter.emit(
            m.MediaPlanned(
                request_id=command.request_id,
                attempt=command.attempt,
                item=command.item,
                tokens=tokens,
                keep_bound=bound,
            )
        )
        return known

    def _keys(self, command: m.EncodeMedia, plan: MediaPlan) -> list[bytes]:
        is_image = command.media.modality == "image"
        return [
            frame_key(
                source_digest=command.media.digest,
                decoder=plan.decoder,
                preprocessing={
                    "modality": command.media.modality,
                    "settings": self._preprocessing.fingerprint,
                    # a video is the same beside any number of images
                    "tiled": is_image and command.is_only_image,
                },
                time_s=time_s,
                weights_revision=self._weights_revision,
                salt=command.salt,
            )
            for time_s in plan.times_s
        ]

    def _image(
        self, command: m.EncodeMedia, known: _Known, clock: _Clock
    ) -> tuple[VisualItem, int, list[bytes]]:
        (key,) = self._keys(command, known.plan)
        height, width = known.plan.height, known.plan.width
        tiled = command.is_only_image
        row, cached = self._cache.get(key), True
        if row is None:
            cached = False
            decoded = self._sandbox.decode(command.media, known.plan, [0])
            clock.lap("decode")
            pixels = image_pixels(decoded.frames[0], self._preprocessing, tiled=tiled)
            clock.lap("preprocess")
            encoded = self._vision.image(pixels, (height, width))
            row = Entry(encoded.embeddings, encoded.saliency)
            self._cache.put(key, row)
            clock.lap("encode")
        crops = self._geometry.image_crops(height, width, 1 if tiled else 2)
        item = VisualItem(
            embeddings=row.embeddings[None],
            saliency=row.saliency[None],
            protect=self._vision.newline_rows((height, width), crops)[None],
            modality="image",
        )
        return item, len(row.embeddings) if cached else 0, [key]

    def _video(
        self, command: m.EncodeMedia, known: _Known, clock: _Clock
    ) -> tuple[VisualItem, int, list[bytes]]:
        keys = self._keys(command, known.plan)
        rows = {i: row for i, key in enumerate(keys) if (row := self._cache.get(key)) is not None}
        known.lost -= rows.keys()  # another range of the same file may have decoded them
        cached = len(rows)
        wanted = [i for i in range(len(keys)) if i not in rows and i not in known.lost]
        for positions in _segments(wanted):
            decoded = self._sandbox.decode(command.media, known.plan, positions)
            known.lost |= set(positions) - set(decoded.positions)
            clock.lap("decode")
            if not decoded.positions:
                continue
            pixels = video_pixels(decoded.frames, self._preprocessing)
            clock.lap("preprocess")
            encoded = self._vision.video(pixels)
            for i, embeddings, saliency in zip(
                decoded.positions, encoded.embeddings, encoded.saliency, strict=True
            ):
                rows[i] = Entry(embeddings.clone(), saliency.clone())
                self._cache.put(keys[i], rows[i])
            clock.lap("encode")
            # a long video is many segments: each says that the worker is alive
            self._reporter.emit(m.Heartbeat())
        if not rows:
            raise MediaError("Expected a video with frames that decode, but none of its frames did")
        ordered = [rows[i] for i in sorted(rows)]
        item = VisualItem(
            embeddings=torch.stack([row.embeddings for row in ordered]),
            saliency=torch.stack([row.saliency for row in ordered]),
            protect=None,
            modality="video",
        )
        return item, cached * self._geometry.frame_tokens, [keys[i] for i in sorted(rows)]


def _segments(positions: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(positions), SEGMENT_FRAMES):
        yield positions[first : first + SEGMENT_FRAMES]


def _item_key(frame_keys: list[bytes], methods: Methods) -> str:
    """What the published rows are, in hex: equal keys, equal rows."""
    settings = f"{methods.prune} {methods.keep}".encode()
    return sha256(b"\0".join([*frame_keys, settings])).hexdigest()[:32]


@lru_cache(maxsize=64)
def _pruner(name: str, keep: float) -> Pruner:
    return make_pruner(name, keep)


def _report(media: MediaRef, known: _Known) -> MediaReport:
    times = tuple(t for i, t in enumerate(known.plan.times_s) if i not in known.lost)
    return MediaReport(
        source=media.source,
        frames=len(times),
        timestamps_s=times,
        lost_frames=len(known.lost),
        width=known.plan.width,
        height=known.plan.height,
    )
