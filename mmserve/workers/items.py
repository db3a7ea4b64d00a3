"""A media item on its way through an encode worker: what the tower is to see next, what is published.

An item is published in parts, in order; what the reduction method looks at together stays together. Pictures
seen before come from the embedding cache. Knows nothing about queues or about other items.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve import messages as m
from mmserve.budget import share_of
from mmserve.config import WireDtype
from mmserve.encoders.base import Features, VisionEncoder
from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers.record import Entry
from mmserve.kv.identity import KEY_BYTES
from mmserve.media.digest import frame_key
from mmserve.media.plan import MediaPlan
from mmserve.media.pool import SandboxPool
from mmserve.media.preprocess import Preprocessing, image_pixels
from mmserve.media.textual import is_textual
from mmserve.methods import inner_part, outer_part, takes_no_keep
from mmserve.models.layout.llava_onevision import Geometry
from mmserve.pruning.base import Pruner, VisualItem, make_pruner
from mmserve.request import MediaReport, Methods, Modality, tenant_of
from mmserve.transfer import LeaseStore
from mmserve.workers import survivors
from mmserve.workers.handoff import embedding_arrays
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
    wire_dtype: WireDtype = "auto"  # of what is published for prefill
    overlap: bool = True  # the tower looks at a video, and its first part is published, while it decodes


@dataclass(slots=True)
class Known:
    """An item that was opened before: its plan and the frames that turned out not to decode."""

    plan: MediaPlan
    lost: set[int] = field(default_factory=set)
    is_textual: bool | None = None  # of an image; None until somebody had to know


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
        """Whether `pixels` may be asked for: it waits for no decoder then."""

    def wait(self) -> None:
        """Wait for a decoder, while there is nothing else to do."""

    def pixels(self) -> Tensor | None:
        """What the tower is to see next [P, 3, S, S]; None when nothing is left to do here."""

    def take(self, features: Features) -> None:
        """What the tower made of it."""

    def close(self) -> None:
        """Give up what is being decoded."""


class Work:
    """What images and videos have in common."""

    pruner: Pruner
    layout: survivors.Layout
    is_guarded = False  # it was to be reduced, and is left alone

    def __init__(self, command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> None:
        self.command = command
        self.known = known
        self.tools = tools
        self.clock = clock
        self.cached_tokens = 0
        self._passed = 0  # tokens of the item, a newline at its end not counted
        self._survivors: list[tuple[Tensor, Tensor]] = []  # with weights, where asked for
        self.tenant = tenant_of(command.salt)
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
        frame: list[Tensor] = []
        keys: list[bytes] = []
        tokens = frames = 0
        with self.clock.measure("prune"):
            for window in reduced:
                left = self.pruner.reduce(window.item)
                if command.report_tokens:
                    self._survivors.append((left.source + self._passed, left.weight))
                self._passed += window.item.saliency.numel()
                embeddings.append(left.embeddings)
                index.append(left.source)
                source.append(left.source + tokens)
                frame.append(_frames_of(window.item, left.source, frames))
                frames += len(window.item.saliency)
                keys += [_window_key(window.keys, self.pruner)] * len(left.source)
                tokens += window.item.saliency.numel()
            if newline is not None:  # ends every video, is never reduced
                embeddings.append(newline[None])
                index.append(index[0].new_zeros(1) if index else torch.zeros(1, dtype=torch.int64))
                source.append(index[-1] + tokens)
                frame.append(torch.full_like(index[-1], -1))
                keys.append(_newline_key(tools.weights_revision))
                tokens += 1
        with self.clock.measure("publish"):
            lease = tools.leases.publish(
                {
                    **embedding_arrays(torch.cat(embeddings), tools.wire_dtype),
                    "source": torch.cat(source).to(torch.int32).cpu().numpy(),
                    "index": torch.cat(index).to(torch.int32).cpu().numpy(),
                    "frame": torch.cat(frame).to(torch.int32).cpu().numpy(),
                    "key": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
                },
                owner=command.request_id,
            )
        tools.reporter.emit(
            m.MediaEncoded(
                request_id=command.request_id,
                attempt=command.attempt,
                item=command.item,
                part=m.EncodedPart(
                    lease=lease,
                    tokens=tokens,
                    kept=len(keys),
                    guarded=self.is_guarded,
                    frame_tokens=self._frame_tokens,
                ),
                whole=self._whole() if is_last else None,
            )
        )

    @property
    def _frame_tokens(self) -> int:
        return 0 if self.command.media.modality == "image" else self.tools.geometry.frame_tokens

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
            guarded=self.is_guarded,
            tokens=survivors.token_report(self._survivors, self.layout) if self._survivors else None,
        )
        return m.EncodedMedia(cached_tokens=self.cached_tokens, report=report, times=self.clock.times())


class ImageWork(Work):
    """An image: all of its crops at once, one part."""

    def __init__(self, command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> None:
        super().__init__(command, known, tools, clock)
        self._size = known.plan.height, known.plan.width
        images = 1 if command.is_only_image else 2
        self._num_crops = tools.geometry.image_crops(*self._size, images)
        self._grids = tools.geometry.image_grids(*self._size, images)
        self.tokens = tools.geometry.image_tokens(*self._size, images)
        free = sum(rows * columns for rows, columns in self._grids)
        self.layout = survivors.layout_of(self.tokens, self._grids)
        self.pruner = pruner_of(command.methods, "image", 1, free)
        self._may_guard = self._is_reduced() and not command.methods.prune_text_images
        self._row = tools.cache.get(self.keys[0], tokens=self.tokens, tenant=self.tenant)
        self._is_published = False
        self.crops = 0 if self._row is not None else self._num_crops

    def _is_reduced(self) -> bool:
        """Whether it is meant to be, here or inside the model."""
        inner = inner_part(self.command.methods)
        if inner is not None and inner.keep != 1:
            return True
        return not takes_no_keep(self.pruner.name) and self.pruner.keep < 1

    def is_idle(self) -> bool:
        return False

    def is_ready(self) -> bool:
        return True  # an image decodes in no time

    def wait(self) -> None:
        """There is nothing to wait for."""

    def pixels(self) -> Tensor | None:
        if self._is_published:
            return None
        if self._row is not None:
            self.cached_tokens = len(self._row.embeddings)
            if self._may_guard and self.known.is_textual is None:
                self._judge(self._picture())
            self._publish(self._row)
            return None
        picture = self._picture()
        if self._may_guard:
            self._judge(picture)
        with self.clock.measure("preprocess"):
            tiled = self.command.is_only_image
            return image_pixels(picture, self.tools.preprocessing, tiled=tiled)

    def _picture(self) -> NDArray[np.uint8]:
        with self.clock.measure("decode"):
            picture: NDArray[np.uint8] = self.tools.sandbox.decode(
                self.command.media, self.known.plan, [0]
            ).frames[0]
            return picture

    def _judge(self, picture: NDArray[np.uint8]) -> None:
        with self.clock.measure("prune"):
            self.known.is_textual = is_textual(picture)

    def take(self, features: Features) -> None:
        encoded = self.tools.vision.pack(features, self._size)
        row = Entry(encoded.embeddings, encoded.saliency)
        self.tools.cache.put(self.keys[0], row, tenant=self.tenant)
        self._publish(row)

    def _publish(self, row: Entry) -> None:
        item = VisualItem(
            embeddings=row.embeddings[None],
            saliency=row.saliency[None],
            protect=self.tools.vision.newline_rows(self._size, self._num_crops)[None],
            modality="image",
            grids=self._grids,
        )
        self._is_published = True
        if self._may_guard and self.known.is_textual:
            self.is_guarded, self.pruner = True, make_pruner("none", 1.0)
        self.publish([Window(self.keys, item)], is_last=True)

    def close(self) -> None:
        """Nothing is decoded ahead."""


def pruner_of(methods: Methods, modality: Modality, frames: int, tokens: int) -> Pruner:
    """What reduces an item of so many frames, an image being one, of so many tokens that may go."""
    name, keep, options = outer_part(methods, modality)
    assert keep is not None, "only what acts inside the model may leave that open"
    return make_pruner(name, share_of(keep, frames, tokens), **options)


def _frames_of(item: VisualItem, source: Tensor, first: int) -> Tensor:
    """Which frame of a part each survivor belongs to, those of this item from `first` on; -1 in images."""
    if item.modality == "image":
        return torch.full_like(source, -1)
    return source // item.saliency.shape[1] + first


def _window_key(frame_keys: Sequence[bytes], pruner: Pruner) -> bytes:
    """What the rows of a window are: equal keys and indices, equal rows."""
    settings = repr(pruner).encode()
    return blake2b(b"\0".join([*frame_keys, settings]), digest_size=KEY_BYTES).digest()


def _newline_key(weights_revision: str) -> bytes:
    return blake2b(f"newline {weights_revision}".encode(), digest_size=KEY_BYTES).digest()
