"""Which worker a waiting job goes to. Pure functions of the tables; the dispatcher acts on the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from dataclasses import dataclass

from mmserve.messages import Role, answer_slots
from mmserve.workers.records import Record, Worker


@dataclass(frozen=True, slots=True)
class Job:
    """Work that waits for a worker with credit: an item to encode, a prompt, or a decode.

    Jobs are taken by `turn`, the lowest first. Encoding takes no slots.
    """

    request_id: str
    attempt: int
    role: Role
    item: int | None
    slots: int  # per head: room that it is given at first
    most_slots: int  # what it may grow to
    turn: tuple[int, bool, int]
    queued_at: float


def new_job(record: Record, role: Role, now: float, *, item: int | None = None, prompt_slots: int = 0) -> Job:
    """By priority; then first what was begun before, since somebody waits in the middle of an answer."""
    sampling, known = record.submitted.sampling, len(record.tokens)
    needs_slots = role is not Role.ENCODE
    return Job(
        request_id=record.request_id,
        attempt=record.attempt,
        role=role,
        item=item,
        slots=prompt_slots + answer_slots(sampling, known) if needs_slots else 0,
        most_slots=prompt_slots + sampling.max_tokens if needs_slots else 0,
        turn=(record.submitted.priority, record.attempt == 0, record.arrival),
        queued_at=now,
    )


def room(workers: Iterable[Worker], role: Role) -> int | None:
    """Slots of the largest worker of a role when idle; None while there is no worker to ask."""
    return max((worker.capacity.slots for worker in workers if role in worker.roles), default=None)


def holds_back(job: Job, record: Record) -> bool:
    """Whether later jobs of its role wait behind a job for which nobody has credit now.

    Else small prompts would starve a large one. An item waits for a place at its own encoder only, and a
    suspect keeps others from the worker that it reserved.
    """
    return job.role is not Role.ENCODE and not record.is_suspect


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
    assert job.item is not None
    digest = record.submitted.media[job.item].digest

    def weight(worker: Worker) -> bytes:
        # names are role-slot-generation: a restarted slot keeps its media
        slot = worker.name.rpartition("-")[0]
        return hashlib.sha256(f"{digest}/{slot}".encode()).digest()

    return max(able, key=weight, default=None)
