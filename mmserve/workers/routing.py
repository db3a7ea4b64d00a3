"""Which worker a waiting job goes to. Pure functions of the tables; the dispatcher acts on the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from dataclasses import dataclass

from mmserve.messages import Role
from mmserve.workers.records import Record, Worker


@dataclass(frozen=True, slots=True)
class Job:
    """Work that waits for a worker with credit: an item to encode, a prompt, or a decode."""

    request_id: str
    attempt: int
    role: Role
    item: int | None
    slots: int
    queued_at: float


def choose(
    job: Job, record: Record, workers: Iterable[Worker], live_requests: Container[str]
) -> Worker | None:
    """The worker for a job, or None while none has credit. May reserve one for a suspect."""
    able = [worker for worker in workers if job.role in worker.roles]
    for worker in able:
        if worker.reserved_for not in live_requests:
            worker.reserved_for = None
    if record.is_suspect:
        return _alone(able, record)
    free = [worker for worker in able if worker.reserved_for is None and worker.can_take(job.slots)]
    if job.role is Role.ENCODE:
        owner = _owner(able, record, job)
        return owner if owner in free else None
    return min(free, key=lambda worker: (len(worker.holds), worker.name), default=None)


def _alone(able: list[Worker], record: Record) -> Worker | None:
    """A suspect waits for an empty worker and keeps it to itself; it reserves the least busy one."""
    free = [w for w in able if w.reserved_for in (None, record.request_id) and not w.is_killed]
    if not free:
        return None
    worker = min(free, key=lambda w: (w.reserved_for is None, len(w.holds), w.name))
    worker.reserved_for = record.request_id
    return None if worker.holds - {record.request_id} else worker


def _owner(able: list[Worker], record: Record, job: Job) -> Worker | None:
    """Rendezvous hashing: the same media goes to the same encode worker, so its cache is used."""
    assert record.prompt is not None
    assert job.item is not None
    digest = record.prompt.media[job.item].digest

    def weight(worker: Worker) -> bytes:
        # names are role-slot-generation: a restarted slot keeps its media
        slot = worker.name.rpartition("-")[0]
        return hashlib.sha256(f"{digest}/{slot}".encode()).digest()

    return max(able, key=weight, default=None)
