"""One long video on several encode workers: who helps its owner with which frames, and how they get there.

Pure Python. The owner alone reduces and publishes; a helper's frames reach it under leases.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmserve import messages as m
from mmserve.request import SEGMENT_FRAMES
from mmserve.workers import commands
from mmserve.workers.ledger import Ledger
from mmserve.workers.records import Record, Worker


class Sharing(Ledger):
    """The part of the dispatcher that spreads items over workers."""

    def _share(self, record: Record, owner: Worker, event: m.MediaPlanned) -> None:
        """Let encode workers that have nothing to do take a part of a long video."""
        item = record.items[event.item]
        if record.is_suspect or item.worker != owner.name:
            return
        idle = [worker for worker in self.workers.values() if worker is not owner and worker.can_help]
        for helper, positions in zip(idle, given_away(event.missing, len(idle)), strict=False):
            item.helpers[helper.name] = set(positions)
            helper.holds.add(record.request_id)
            self._send(helper, commands.encode_frames(record, event.item, positions))
        if item.helpers:
            self._tell(owner, commands.await_frames(record, event.item))

    def _frames_encoded(self, worker: Worker, event: m.FramesEncoded) -> None:
        """A helper's frames go to the item's owner, who reduces and publishes them."""
        frames = event.frames
        if frames.lease is not None:
            self.lease_owner[frames.lease.lease_id] = worker.name
        record = self._current(event.request_id, event.attempt)
        item = record.items[event.item] if record is not None else None
        if record is None or item is None or worker.name not in item.helpers:
            if frames.lease is not None:
                self._release(frames.lease)
            return
        item.helpers[worker.name].difference_update(frames.positions, frames.lost)
        if event.is_last:
            del item.helpers[worker.name]
            self._leave_if_done(worker, record)
        if item.worker is not None:
            self._tell(self.workers[item.worker], commands.take_frames(event))
        if frames.lease is not None:
            if item.worker is not None:
                item.lent.append(frames.lease)
            else:  # the item was whole before its owner could leave anything to others
                self._release(frames.lease)

    def _take_back(self, record: Record, lost: str) -> None:
        """What a lost helper had is its owner's again."""
        for index, item in enumerate(record.items):
            if item.helpers.pop(lost, None) is not None and item.worker in self.workers:
                self._tell(self.workers[item.worker], commands.await_frames(record, index))


def given_away(missing: Sequence[int], helpers: int) -> list[tuple[int, ...]]:
    """Which frames of a video each helper encodes: whole segments, as many as its owner keeps."""
    segments = [tuple(missing[i : i + SEGMENT_FRAMES]) for i in range(0, len(missing), SEGMENT_FRAMES)]
    each = len(segments) // (helpers + 1) or 1
    helping = min(helpers, len(segments) - 1)
    runs = [segments[len(segments) - each * (n + 1) : len(segments) - each * n] for n in range(helping)]
    return [tuple(position for segment in run for position in segment) for run in reversed(runs)]
