"""The dispatcher's tables, and the entries that keep them true: what waits, is sent, held, released, ended.

Pure Python with an injected clock. Decides nothing: when something happens is the dispatcher's part.
"""

from __future__ import annotations

import bisect
import secrets
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from mmserve import messages as m
from mmserve.errors import BadRequest, MMServeError
from mmserve.messages import Role
from mmserve.request import FinishReason
from mmserve.workers.records import Item, Record, State, Worker
from mmserve.workers.routing import Job, new_job, room

OF_ALL = "bytes/disk"  # each worker tells the size of the one file that all share


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
    announced once; a lease is in `lease_owner` until it is released or orphaned; `waiting` is ordered by
    turn.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.epoch = secrets.token_hex(8)
        self.clock = clock
        self.records: dict[str, Record] = {}
        self.workers: dict[str, Worker] = {}
        self.waiting: list[Job] = []
        self.outbox: deque[tuple[str, int, m.AnyCommand]] = deque()  # worker, number, command
        self.updates: deque[Update] = deque()
        self.orphaned: deque[m.Lease] = deque()  # leases whose owner is gone: the shell unlinks them
        self.counts: dict[str, int] = {}  # events by reason, for /metrics
        self.work: dict[str, m.WorkCounted] = {}  # by worker
        self.lost_work: Counter[str] = Counter()  # of workers that are gone
        self.lease_owner: dict[str, str] = {}

    def ready_roles(self) -> set[Role]:
        return {role for worker in self.workers.values() if not worker.is_killed for role in worker.roles}

    def work_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """What all workers have done, and what they hold now, by name."""
        totals, now = Counter(self.lost_work), Counter[str]()
        for counted in self.work.values():
            totals.update(counted.totals)
            now.update(counted.now)
        if OF_ALL in now:
            now[OF_ALL] = max(counted.now.get(OF_ALL, 0) for counted in self.work.values())
        return dict(totals), dict(now)

    def _forget_work(self, worker: str) -> None:
        if (counted := self.work.pop(worker, None)) is not None:
            self.lost_work.update(counted.totals)

    def _count(self, reason: str, times: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + times

    def _current(self, request_id: str, attempt: int) -> Record | None:
        record = self.records.get(request_id)
        return record if record is not None and record.attempt == attempt else None

    def _start(self, record: Record) -> None:
        if not record.items:
            self._queue_prefill(record)
            return
        record.state = State.ENCODING
        for index in range(len(record.items)):
            self._wait(record, Role.ENCODE, item=index)

    def _queue_prefill(self, record: Record) -> None:
        record.state = State.PREFILLING
        self._wait(record, Role.PREFILL, prompt_slots=record.prompt_slots)

    def _wait(self, record: Record, role: Role, *, item: int | None = None, prompt_slots: int = 0) -> None:
        job = new_job(record, role, self.clock(), item=item, prompt_slots=prompt_slots)
        bisect.insort(self.waiting, job, key=lambda job: job.turn)

    def _check_room(self, record: Record, role: Role, slots: int) -> bool:
        """Fail what not even an idle worker can hold: it would wait for credit until its deadline."""
        most = room(self.workers.values(), role)
        if most is None or slots <= most:
            return True
        text = f"Expected a prompt of at most {most} tokens with its answer, but got {slots}"
        self._fail(record, BadRequest(text))
        return False

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

    def _given_up(self, worker: Worker, event: m.RequestPreempted | m.LeaseLost) -> Record | None:
        """A request that a language worker has forgotten by itself; None when it had none."""
        record = self._current(event.request_id, event.attempt)
        if record is None or record.worker != worker.name or record.request_id not in worker.holds:
            return None
        record.worker = None
        self._leave_if_done(worker, record)  # it may be encoding the rest of the prompt
        return record

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

    def _served_by(self, worker: str) -> list[str]:
        """Leases that can be read only while this worker lives; what is mapped outlives it."""
        leases = [lease for record in self.records.values() for lease in record.leases if lease.endpoint]
        return [lease.lease_id for lease in leases if self.lease_owner.get(lease.lease_id) == worker]

    def _gone_of(self, record: Record) -> list[str]:
        """Leases of a prompt that cannot be read any more: evicted, or served by a worker that is gone."""
        return [lease.lease_id for lease in record.leases if not self._can_be_read(lease)]

    def _can_be_read(self, lease: m.Lease) -> bool:
        owner = self.lease_owner.get(lease.lease_id)
        return owner is not None and (not lease.endpoint or owner in self.workers)

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
