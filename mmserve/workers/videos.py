"""Videos on their way through an encode worker, a segment at a time.

Each part is published as soon as all of its frames are there, whoever encoded them: a worker may leave frames
of a long video to others. Knows nothing about queues or about other items.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.encoders.base import Features
from mmserve.encoders.tiers.record import Entry
from mmserve.errors import MediaError
from mmserve.media.pool import Segments
from mmserve.media.preprocess import video_pixels
from mmserve.pruning.base import VisualItem, window_frames, windows
from mmserve.request import MediaRef
from mmserve.tensors import tensors_of, to_numpy
from mmserve.transfer import LeaseReader, LeaseUnreadable
from mmserve.workers import survivors
from mmserve.workers.items import Clock, Known, Tools, Window, Work, pruner_of

logger = logging.getLogger(__name__)


class Frames:
    """Frames of a video on their way to the tower, a segment at a time."""

    def __init__(self, media: MediaRef, known: Known, positions: Iterable[int], tools: Tools) -> None:
        self.left = set(positions)
        self.lost: set[int] = set()  # of the last segment
        self.positions: tuple[int, ...] = ()  # that the tower looks at
        self._media = media
        self._known = known
        self._tools = tools
        self._decoding: Segments | None = None

    def is_ready(self) -> bool:
        return not self.left or self._segments.is_ready(whole=not self._tools.overlap)

    def wait(self, clock: Clock) -> None:
        with clock.measure("decode"):
            self._segments.wait()

    @property
    def _segments(self) -> Segments:
        """Decoding begins when it is first asked for."""
        if self._decoding is None:
            self._decoding = self._tools.sandbox.segments(self._media, self._known.plan, sorted(self.left))
        return self._decoding

    def pixels(self, clock: Clock) -> Tensor | None:
        """The next segment; None where all of its frames are lost."""
        with clock.measure("decode"):
            decoded = next(self._segments)
        self.positions, self.lost = decoded.positions, set(decoded.lost)
        self.left -= self.lost.union(self.positions)
        self._known.lost |= self.lost
        if not self.positions:
            return None
        with clock.measure("preprocess"):
            return video_pixels(decoded.frames, self._tools.preprocessing)

    def change(self, positions: Iterable[int]) -> None:
        """From now on exactly these are left; what is decoded of them already is not lost."""
        self.left = set(positions)
        if self._decoding is not None:
            self._decoding.change(self.left)

    def close(self) -> None:
        if self._decoding is not None:
            self._decoding.close()


class VideoWork(Work):
    """A video: a segment of frames at a time; windows are published when all of their frames are there."""

    def __init__(self, command: m.EncodeMedia, known: Known, tools: Tools, clock: Clock) -> None:
        super().__init__(command, known, tools, clock)
        found = tools.cache.get_many(self.keys, tokens=tools.geometry.frame_tokens, tenant=self.tenant)
        self._rows = {position: found[key] for position, key in enumerate(self.keys) if key in found}
        known.lost -= self._rows.keys()  # another range of the same file may have decoded them
        self.cached_tokens = len(self._rows) * tools.geometry.frame_tokens
        wanted = [i for i in range(len(self.keys)) if i not in self._rows and i not in known.lost]
        self.crops = len(wanted)
        self.missing = set(wanted)  # neither there nor lost
        self._frames = Frames(command.media, known, wanted, tools)  # that are not left to others
        frames, tokens = known.plan.num_frames, tools.geometry.frame_tokens
        self.pruner = pruner_of(command.methods, "video", frames, tokens)
        self.layout = survivors.layout_of(tokens, (tools.geometry.frame_grid,))
        self._windows = list(windows(len(self.keys), window_frames(self.pruner)))
        self._has_published = not self._rows  # what the cache had
        self._aside: tuple[int, ...] = ()

    def is_idle(self) -> bool:
        return self._has_published and bool(self.missing) and not self._frames.left

    def is_ready(self) -> bool:
        return (self.tools.overlap and not self._has_published) or self._frames.is_ready()

    def wait(self) -> None:
        self._frames.wait(self.clock)

    def pixels(self) -> Tensor | None:
        if not self._has_published:
            self._publish_complete()
        while self._frames.left:
            pixels = self._frames.pixels(self.clock)
            self.missing -= self._frames.lost
            if pixels is not None:
                return pixels
        if self._windows:
            self._publish_complete()
        return None

    def take(self, features: Features) -> None:
        encoded = self.tools.vision.frames(features)
        self._add(self._frames.positions, encoded.embeddings, encoded.saliency)

    def leave(self, positions: Iterable[int]) -> None:
        """These frames, and no others, are encoded elsewhere."""
        # the tower may be looking at the last ones now
        self._frames.change(self.missing.difference(positions, self._frames.positions))

    def arrive(self, frames: m.EncodedFrames, reader: LeaseReader) -> None:
        """Frames that were encoded elsewhere: what is here stays, what cannot be read is done here."""
        self.known.lost |= self.missing.intersection(frames.lost)
        self.missing -= set(frames.lost)
        if frames.lease is None:
            self._publish_complete()
            return
        try:
            arrays = tensors_of(frames.lease, reader.open(frames.lease))
        except LeaseUnreadable as error:
            logger.warning("frames of another worker are encoded again: %s", error)
            self._frames.change(self._frames.left.union(self.missing.intersection(frames.positions)))
            return
        newline = self.tools.vision.newline
        embeddings, saliency = arrays["embeddings"].to(newline), arrays["saliency"].to(newline.device)
        self._add(frames.positions, embeddings, saliency)

    def _add(self, positions: Sequence[int], embeddings: Tensor, saliency: Tensor) -> None:
        for position, one, salient in zip(positions, embeddings, saliency, strict=True):
            if position in self.missing:
                row = self._rows[position] = Entry(one, salient)
                self.tools.cache.put(self.keys[position], row, tenant=self.tenant)
        self.missing -= set(positions)
        self._publish_complete()

    def close(self) -> None:
        self._frames.close()

    def set_aside(self) -> None:
        """It has to wait: what the cache had is not kept in memory meanwhile, but asked for again."""
        self._aside = tuple(self._rows)
        self._rows.clear()

    def _recall(self) -> None:
        keys = {position: self.keys[position] for position in self._aside}
        tokens = self.tools.geometry.frame_tokens
        found = self.tools.cache.get_many(tuple(keys.values()), tokens=tokens, tenant=self.tenant)
        self._rows |= {position: found[key] for position, key in keys.items() if key in found}
        gone = [position for position, key in keys.items() if key not in found]
        self._aside = ()
        if gone:
            self.cached_tokens -= len(gone) * tokens
            self.missing.update(gone)
            self._frames.change(self._frames.left.union(gone))

    def _publish_complete(self) -> None:
        """Publish the windows before the first frame that is missing, and with the last one the newline."""
        if self._aside:
            self._recall()
        self._has_published = True
        if self.missing and not self.tools.overlap:
            return
        frontier = min(self.missing, default=len(self.keys))
        complete = 0
        while complete < len(self._windows) and self._windows[complete][1] <= frontier:
            complete += 1
        ready, self._windows = self._windows[:complete], self._windows[complete:]
        if not ready:
            return
        is_last = not self._windows
        found = [window for span in ready if (window := self._window(*span)) is not None]
        if is_last and len(self.known.lost) == len(self.keys):
            raise MediaError("Expected a video with frames that decode, but none of its frames did")
        if found or is_last:
            newline = self.tools.vision.newline if is_last else None
            self.publish(found, is_last=is_last, newline=newline)

    def _window(self, start: int, stop: int) -> Window | None:
        """The frames of a window that decoded; None when there are none."""
        there = [position for position in range(start, stop) if position in self._rows]
        if not there:
            return None
        rows = [self._rows.pop(position) for position in there]
        item = VisualItem(
            embeddings=torch.stack([row.embeddings for row in rows]),
            saliency=torch.stack([row.saliency for row in rows]),
            protect=None,
            modality="video",
            grids=(self.tools.geometry.frame_grid,),
        )
        return Window([self.keys[position] for position in there], item)


class FramesWork:
    """Frames of a video that another worker owns: they are published as they are, for that worker."""

    def __init__(self, command: m.EncodeFrames, known: Known, tools: Tools, clock: Clock) -> None:
        self.clock = clock
        self.crops = len(command.positions)
        self._command = command
        self._tools = tools
        self._frames = Frames(command.media, known, command.positions, tools)

    def is_idle(self) -> bool:
        return False

    def is_ready(self) -> bool:
        return self._frames.is_ready()

    def wait(self) -> None:
        self._frames.wait(self.clock)

    def pixels(self) -> Tensor | None:
        while self._frames.left:
            pixels = self._frames.pixels(self.clock)
            if pixels is not None:
                return pixels
            self._report((), None)
        return None

    def take(self, features: Features) -> None:
        encoded = self._tools.vision.frames(features)
        lease = self._tools.leases.publish(
            {"embeddings": to_numpy(encoded.embeddings), "saliency": to_numpy(encoded.saliency)},
            owner=self._command.request_id,
        )
        self._report(self._frames.positions, lease)

    def close(self) -> None:
        self._frames.close()

    def _report(self, positions: tuple[int, ...], lease: m.Lease | None) -> None:
        command, frames = self._command, self._frames
        self._tools.reporter.emit(
            m.FramesEncoded(
                request_id=command.request_id,
                attempt=command.attempt,
                item=command.item,
                frames=m.EncodedFrames(positions=positions, lost=tuple(sorted(frames.lost)), lease=lease),
                is_last=not frames.left,
            )
        )
