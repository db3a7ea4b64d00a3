"""The dispatcher's tables, and the entries that keep them true: what is sent, held, released and ended.

Pure Python with an injected clock. Decides nothing: when something happens is the dispatcher's part.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mmserve import messages as m
from mmserve.errors import MMServeError
from mmserve.messages import Role
from mmserve.request import FinishReason
from mmserve.workers.records import Item, Record, State, Worker


@dataclass(frozen=True, slots=True)
class Update:
    """News for whoever waits on a request: tokens, or (with `is_final`) its terminal record."""

    request_id: str
    tokens: tuple[m.Sampled, ...]
    record: Record
    is_final: bool


class Ledger:
    """Request table, worker table, and what is to leave this process.

    Invariants: a record is in `records` exactly while it is not terminal; each terminal record was
    announced once; a lease is in `lease_owner` until it is released or orphaned.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.epoch = secrets.token_hex(8)
        self.clock = clock
        self.records: dict[str, Record] = {}
        self.workers: dict[str, Worker] = {}
        self.outbox: deque[tuple[str, int, m.AnyCommand]] = deque()  # worker, number, command
        self.updates: deque[Update] = deque()
        self.orphaned: deque[m.Lease] = deque()  # leases whose owner is gone: the shell unlinks them
        self.counts: dict[str, int] = {}  # events by reason, for /metrics
        self.lease_owner: dict[str, str] = {}

    def ready_roles(self) -> set[Role]:
        return {role for worker in self.workers.values() if not worker.is_killed for role in worker.roles}

    def _count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def _current(self, request_id: str, attempt: int) -> Record | None:
        record = self.records.get(request_id)
        return record if record is not None and record.attempt == attempt else None

    def _send(self, worker: Worker, command: m.AnyCommand, slots: int = 0) -> None:
        worker.sent += 1
        worker.unseen.append((worker.sent, slots))
        self._tell(worker, command)

    def _tell(self, worker: Worker, command: m.AnyCommand) -> None:
        self.outbox.append((worker.name, worker.sent, command))

    def _fail(self, record: Record, error: MMServeError) -> None:
        record.error = error
        self._count(f"failed_{error.code}")
        self._end(record, State.FAILED)

    def _end(self, record: Record, state: State, tokens: tuple[m.Sampled, ...] = ()) -> None:
        del self.records[record.request_id]
        self._count(state.value)
        is_known = state is State.FINISHED and record.finish is not FinishReason.STOP
        self._recall(record, is_known=is_known and not any(item.helpers for item in record.items))
        self._release_embeddings(record)
        if record.kv_lease is not None:
            self._release(record.kv_lease)
        record.end(state, self.clock())
        self.updates.append(Update(record.request_id, tokens, record, True))

    def _recall(self, record: Record, *, is_known: bool = False) -> None:
        """No worker has it any more; they are told, unless they know."""
        for worker in self.workers.values():
            if record.request_id in worker.holds:
                self._leave(worker, record)
                if not is_known:
                    self._tell(worker, m.CancelRequest(request_id=record.request_id))

    def _leave_if_done(self, worker: Worker, record: Record) -> None:
        """A worker may have several items of a request, and several stages."""
        helpers = [name for item in record.items for name in item.helpers]
        if worker.name not in (record.worker, *helpers, *(item.worker for item in record.items)):
            self._leave(worker, record)

    def _leave(self, worker: Worker, record: Record) -> None:
        worker.holds.discard(record.request_id)
        if worker.reserved_for == record.request_id:
            worker.reserved_for = None

    def _release_embeddings(self, record: Record) -> None:
        for item in record.items:
            self._release_parts(item)

    def _release_parts(self, item: Item) -> None:
        for lease in (*item.lent, *(part.lease for part in item.parts)):
            self._release(lease)

    def _release(self, lease: m.Lease) -> None:
        """Tell the owner, or leave it to the shell when the owner is gone. Idempotent."""
        owner = self.lease_owner.pop(lease.lease_id, None)
        if owner is None:
            return
        if worker := self.workers.get(owner):
            self._tell(worker, m.ReleaseLease(lease_id=lease.lease_id))
        else:
            self.orphaned.append(lease)

    def _discard(self, event: m.AnyEvent) -> None:
        """The last words of a dead worker: what it published has no owner any more."""
        if isinstance(event, m.MediaEncoded):
            self.orphaned.append(event.part.lease)
        elif isinstance(event, m.FramesEncoded) and event.frames.lease is not None:
            self.orphaned.append(event.frames.lease)
        elif isinstance(event, m.PromptPrefilled) and event.lease is not None:
            self.orphaned.append(event.lease)
