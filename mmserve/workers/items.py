"""A media item on its way through an encode worker: what the tower is to see next, what is published.

An item is published in parts, in order; what the reduction method looks at together stays together. Pictures
seen before come from the embedding cache. Knows nothing about queues or about other items.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.encoders.base import Features, VisionEncoder
from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers.record import Entry
from mmserve.kv.identity import KEY_BYTES
from mmserve.media.digest import frame_key
from mmserve.media.plan import MediaPlan
from mmserve.media.pool import SandboxPool
from mmserve.media.preprocess import Preprocessing, image_pixels
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.pruning.base import Pruner, VisualItem, make_pruner
from mmserve.request import MediaReport, Methods
from mmserve.tensors import to_numpy
from mmserve.transfer import LEASE_TTL_S, LeaseStore
from mmserve.workers.loop import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What every item is encoded with."""

    vision: VisionEncoder
    geometry: Geometry
    preprocessing: Preprocessing
    weights_revision: str
    sandbox: SandboxPool
    cache: EmbeddingCache
    leases: LeaseStore
    reporter: Reporter


@dataclass(slots=True)
class Known:
    """An item that was opened before: its plan and the frames that turned out not to decode."""

    plan: MediaPlan
    lost: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Clock:
    """Milliseconds per stage of one item."""

    spent: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, ms: float) -> None:
        self.spent[stage] = self.spent.get(stage, 0.0) + ms

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, (time.perf_counter() - started_at) * 1e3)

    def times(self) -> m.EncodeTimes:
        stages = ("queue", "decode", "preprocess", "encode", "prune", "publish")
        return m.EncodeTimes(**{stage: self.spent.get(stage, 0.0) for stage in stages})


class Window(NamedTuple):
    """What a method reduces together: `rows` of some frames, and their cache keys."""

    keys: Sequence[bytes]
    item: VisualItem


class ItemWork(Protocol):
    """One item being encoded. `pixels` and `take` alternate until there are no more pixels."""

    clock: Clock
    crops: int  # that the tower is to see in all

    def is_idle(self) -> bool:
        """Whether all that is left is done by other workers."""

    def is_ready(self) -> bool:
        """Whether `pixels` would answer without waiting for a decoder."""

    def pixels(self) -> Tensor | None:
        """What the tower is to see next [P, 3, S, S]; None when nothing is left to do here."""

    def take(self, features: Features) -> None:
        """What the tower made of it."""

    def close(self) -> None:
        """Give up what is being decoded."""


class Work:
    """What images and videos have in common."""

    def __init__(self, command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> None:
        self.command = command
        self.known = known
        self.tools = tools
        self.clock = clock
        self.cached_tokens = 0
        plan, media = known.plan, command.media
        is_image = media.modality == "image"
        self.keys = [
            frame_key(
                source_digest=media.digest,
                decoder=plan.decoder,
                preprocessing={
                    "modality": media.modality,
                    "settings": tools.preprocessing.fingerprint,
                    # a video is the same beside any number of images
                    "tiled": is_image and command.is_only_image,
                },
                time_s=time_s,
                weights_revision=tools.weights_revision,
                salt=command.salt,
            )
            for time_s in plan.times_s
        ]

    def publish(self, reduced: Sequence[Window], *, is_last: bool, newline: Tensor | None = None) -> None:
        """Reduce these windows and publish what is left of them as one part of the item."""
        command, tools = self.command, self.tools
        embeddings: list[Tensor] = []
        source: list[Tensor] = []
        index: list[Tensor] = []
        keys: list[bytes] = []
        tokens = 0
        with self.clock.measure("prune"):
            pruner = pruner_of(command.methods)
            for window in reduced:
                left = pruner.reduce(window.item)
                embeddings.append(left.embeddings)
                index.append(left.source)
                source.append(left.source + tokens)
                keys += [_window_key(window.keys, command.methods)] * len(left.source)
                tokens += window.item.saliency.numel()
            if newline is not None:  # ends every video, is never reduced
                embeddings.append(newline[None])
                index.append(index[0].new_zeros(1) if index else torch.zeros(1, dtype=torch.int64))
                source.append(index[-1] + tokens)
                keys.append(_newline_key(tools.weights_revision))
                tokens += 1
        with self.clock.measure("publish"):
            lease = tools.leases.publish(
                {
                    "embeddings": to_numpy(torch.cat(embeddings)),
                    "source": torch.cat(source).to(torch.int32).cpu().numpy(),
                    "index": torch.cat(index).to(torch.int32).cpu().numpy(),
                    "key": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
                },
                ttl_s=LEASE_TTL_S,
                owner=command.request_id,
            )
        tools.reporter.emit(
            m.MediaEncoded(
                request_id=command.request_id,
                attempt=command.attempt,
                item=command.item,
                part=m.EncodedPart(lease=lease, tokens=tokens, kept=len(keys)),
                whole=self._whole() if is_last else None,
            )
        )

    def _whole(self) -> m.EncodedMedia:
        plan, lost = self.known.plan, self.known.lost
        times = tuple(t for i, t in enumerate(plan.times_s) if i not in lost)
        report = MediaReport(
            source=self.command.media.source,
            frames=len(times),
            timestamps_s=times,
            lost_frames=len(lost),
            width=plan.width,
            height=plan.height,
        )
        return m.EncodedMedia(cached_tokens=self.cached_tokens, report=report, times=self.clock.times())


class ImageWork(Work):
    """An image: all of its crops at once, one part."""

    def __init__(self, command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> None:
        super().__init__(command, known, tools, clock)
        self._size = known.plan.height, known.plan.width
        images = 1 if command.is_only_image else 2
        self._num_crops = tools.geometry.image_crops(*self._size, images)
        self.tokens = tools.geometry.image_tokens(*self._size, images)
        self._row = tools.cache.get(self.keys[0], tokens=self.tokens, tenant=command.salt)
        self._is_published = False
        self.crops = 0 if self._row is not None else self._num_crops

    def is_idle(self) -> bool:
        return False

    def is_ready(self) -> bool:
        return True  # an image decodes in no time

    def pixels(self) -> Tensor | None:
        if self._is_published:
            return None
        if self._row is not None:
            self.cached_tokens = len(self._row.embeddings)
            self._publish(self._row)
            return None
        with self.clock.measure("decode"):
            decoded = self.tools.sandbox.decode(self.command.media, self.known.plan, [0])
        with self.clock.measure("preprocess"):
            tiled = self.command.is_only_image
            return image_pixels(decoded.frames[0], self.tools.preprocessing, tiled=tiled)

    def take(self, features: Features) -> None:
        encoded = self.tools.vision.pack(features, self._size)
        row = Entry(encoded.embeddings, encoded.saliency)
        self.tools.cache.put(self.keys[0], row, tenant=self.command.salt)
        self._publish(row)

    def _publish(self, row: Entry) -> None:
        item = VisualItem(
            embeddings=row.embeddings[None],
            saliency=row.saliency[None],
            protect=self.tools.vision.newline_rows(self._size, self._num_crops)[None],
            modality="image",
        )
        self._is_published = True
        self.publish([Window(self.keys, item)], is_last=True)

    def close(self) -> None:
        """Nothing is decoded ahead."""


def pruner_of(methods: Methods) -> Pruner:
    return _pruner(methods.prune, methods.keep)


@lru_cache(maxsize=64)
def _pruner(name: str, keep: float) -> Pruner:
    return make_pruner(name, keep)


def _window_key(frame_keys: Sequence[bytes], methods: Methods) -> bytes:
    """What the rows of a window are: equal keys and indices, equal rows."""
    settings = f"{methods.prune} {methods.keep}".encode()
    return blake2b(b"\0".join([*frame_keys, settings]), digest_size=KEY_BYTES).digest()


def _newline_key(weights_revision: str) -> bytes:
    return blake2b(f"newline {weights_revision}".encode(), digest_size=KEY_BYTES).digest()
