"""The dispatcher: decides which worker does what next, and that every request ends exactly once.

Pure Python with an injected clock: events and calls go in, commands collect in `outbox`, news for
clients in `updates`. Knows nothing about sockets, processes, tensors or HTTP.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from signal import SIGKILL

import msgspec

from mmserve import messages as m
from mmserve.errors import (
    BadRequest,
    DeadlineExceeded,
    MMServeError,
    Overloaded,
    RequestPoisoned,
    from_code,
)
from mmserve.messages import Role
from mmserve.request import FinishReason, Prompt
from mmserve.workers.records import Item, Record, State, Worker
from mmserve.workers.routing import Job, choose

HEARTBEAT_S = 1.0
LIVENESS = 3  # missed heartbeats until a silent worker is killed
MAX_DEATHS = 3  # without progress, then a request is poison even when only SIGKILL was seen
SUPERVISOR = "supervisor"


@dataclass(frozen=True, slots=True)
class Update:
    """News for whoever waits on a request: tokens, or (with `is_final`) its terminal record."""

    request_id: str
    tokens: tuple[m.Sampled, ...]
    record: Record
    is_final: bool


class Dispatcher:
    """Request table, worker table and waiting jobs.

    Invariants: a record is in `records` exactly while it is not terminal; each terminal record was
    announced once; every job in `waiting` belongs to a live record and its current attempt.
    """

    def __init__(self, *, clock: Callable[[], float], max_active: int, deadline_s: float) -> None:
        self.epoch = secrets.token_hex(8)
        self.clock = clock
        self.max_active = max_active
        self.deadline_s = deadline_s
        self.records: dict[str, Record] = {}
        self.workers: dict[str, Worker] = {}
        self.waiting: deque[Job] = deque()
        self.outbox: deque[tuple[str, int, m.AnyCommand]] = deque()  # worker, number, command
        self.updates: deque[Update] = deque()
        self.orphaned: deque[m.Lease] = deque()  # leases whose owner is gone: the shell unlinks them
        self.counts: dict[str, int] = {}  # events by reason, for /metrics
        self.lease_owner: dict[str, str] = {}
        self.ticked_at = clock()

    # calls from the front door

    def admit(self, deadline_s: float | None = None) -> str:
        """Reserve a place before media is fetched; raises Overloaded when there is none."""
        if len(self.records) >= self.max_active:
            self._count("rejected")
            raise Overloaded(f"Expected fewer than {self.max_active} requests in the server; try again")
        now = self.clock()
        request_id = secrets.token_hex(16)
        deadline = now + (self.deadline_s if deadline_s is None else deadline_s)
        self.records[request_id] = Record(request_id=request_id, admitted_at=now, deadline_at=deadline)
        self._count("admitted")
        return request_id

    def submit(self, request_id: str, prompt: Prompt, fetch_ms: float = 0.0) -> None:
        """Start an admitted request; does nothing if it was cancelled meanwhile."""
        record = self.records.get(request_id)
        if record is None:
            return
        if prompt.sampling.temperature > 0 and prompt.sampling.seed is None:
            # a retry after a lost worker must draw the same tokens
            seeded = msgspec.structs.replace(prompt.sampling, seed=secrets.randbits(62))
            prompt = msgspec.structs.replace(prompt, sampling=seeded)
        record.prompt = prompt
        record.fetch_ms = fetch_ms
        record.state = State.QUEUED
        record.items = [Item() for _ in prompt.media]
        self._start(record)
        self.pump()

    def cancel(self, request_id: str) -> None:
        """Idempotent; the update that follows is final."""
        if record := self.records.get(request_id):
            record.finish = FinishReason.CANCELLED
            self._end(record, State.CANCELLED)
            self.pump()

    def stop(self, request_id: str) -> None:
        """A stop string was found in the text: the answer is complete."""
        if record := self.records.get(request_id):
            record.finish = FinishReason.STOP
            self._end(record, State.FINISHED)
            self.pump()

    def fail(self, request_id: str, error: MMServeError) -> None:
        if record := self.records.get(request_id):
            record.error = error
            self._count(f"failed_{error.code}")
            self._end(record, State.FAILED)
            self.pump()

    def tick(self) -> None:
        """Deadlines and hung workers; call a few times a second."""
        now = self.clock()
        if now - self.ticked_at > HEARTBEAT_S * LIVENESS:
            # this process itself was suspended: nobody could be heard meanwhile
            for worker in self.workers.values():
                worker.last_heard_at = now
        self.ticked_at = now
        for record in [r for r in self.records.values() if now > r.deadline_at]:
            self.fail(
                record.request_id, DeadlineExceeded(f"Expected an answer in time, but was {record.state}")
            )
        for worker in self.workers.values():
            silence = now - worker.last_heard_at
            if silence > HEARTBEAT_S * LIVENESS + worker.step_bound_s and not worker.is_killed:
                worker.is_killed = True
                self._count("hung_workers")
                self.outbox.append((SUPERVISOR, 0, m.KillWorker(worker=worker.name)))
        self.pump()

    # events

    def handle(self, name: str, upward: m.Upward) -> None:
        """Take one event; anything from an unknown worker or an old attempt changes nothing."""
        if upward.epoch not in ("", self.epoch):
            self._count("wrong_epoch")
            return
        event = upward.event
        if isinstance(event, m.WorkerDied):
            self._died(event)
        elif isinstance(event, m.WorkerReady):
            self._ready(name, event, upward.credits)
        elif worker := self.workers.get(name):
            worker.heard(upward.credits, upward.seen, self.clock())
            self._handle(worker, event)
        else:
            self._discard(event)
        self.pump()

    def _discard(self, event: m.AnyEvent) -> None:
        """The last words of a dead worker: what it published has no owner any more."""
        if isinstance(event, m.MediaEncoded):
            self.orphaned.append(event.encoded.lease)
        elif isinstance(event, m.PromptPrefilled) and event.lease is not None:
            self.orphaned.append(event.lease)

    def _ready(self, name: str, event: m.WorkerReady, credits: m.Credits) -> None:
        self._count("workers_ready")
        self.workers[name] = Worker(
            name=name,
            roles=event.roles,
            pid=event.pid,
            capacity=event.capacity,
            credits=credits,
            last_heard_at=self.clock(),
        )

    def _handle(self, worker: Worker, event: m.AnyEvent) -> None:
        if isinstance(event, m.MediaPlanned):
            self._planned(event)
        elif isinstance(event, m.MediaEncoded):
            self._encoded(worker, event)
        elif isinstance(event, m.PromptPrefilled):
            self._prefilled(worker, event)
        elif isinstance(event, m.TokensDecoded):
            for token in event.tokens:
                self._decoded(worker, token)
        elif isinstance(event, m.RequestFailed):
            record = self._current(event.request_id, event.attempt)
            if record is not None:
                self.fail(record.request_id, from_code(event.code, event.public_message))
        elif isinstance(event, m.StepStarted):
            worker.step, worker.step_bound_s = event.requests, event.bound_s

    def _current(self, request_id: str, attempt: int) -> Record | None:
        record = self.records.get(request_id)
        return record if record is not None and record.attempt == attempt else None

    def _planned(self, event: m.MediaPlanned) -> None:
        record = self._current(event.request_id, event.attempt)
        if record is None:
            return
        record.items[event.item].keep_bound = event.keep_bound
        self._check_room(record, sum(item.keep_bound for item in record.items) + self._text_slots(record))

    def _check_room(self, record: Record, slots: int) -> bool:
        """Fail what not even an idle worker can hold: it would wait for credit until its deadline."""
        prefills = [w for w in self.workers.values() if Role.PREFILL in w.roles]
        room = max((worker.capacity.slots for worker in prefills), default=slots)
        if slots > room:
            text = f"Expected a prompt of at most {room} tokens with its answer, but got {slots}"
            self.fail(record.request_id, BadRequest(text))
        return slots <= room

    def _encoded(self, worker: Worker, event: m.MediaEncoded) -> None:
        self.lease_owner[event.encoded.lease.lease_id] = worker.name
        record = self._current(event.request_id, event.attempt)
        item = record.items[event.item] if record is not None else None
        if record is None or item is None or item.encoded is not None:
            self._release(event.encoded.lease)
            return
        item.encoded, item.cached_tokens = event.encoded, event.cached_tokens
        item.report, item.times, item.worker = event.report, event.times, None
        if all(other.worker != worker.name for other in record.items):
            self._leave(worker, record)
        if all(other.encoded is not None for other in record.items):
            self._queue_prefill(record)

    def _prefilled(self, worker: Worker, event: m.PromptPrefilled) -> None:
        if event.lease is not None:
            self.lease_owner[event.lease.lease_id] = worker.name
        record = self._current(event.request_id, event.attempt)
        if record is None or record.state is not State.PREFILLING:
            if event.lease is not None:
                self._release(event.lease)
            return
        self._release_embeddings(record)
        record.prefilled, record.kv_lease = event, event.lease
        record.state = State.DECODING
        if event.lease is not None:
            self._leave(worker, record)
        if event.first is not None and not self._accept(record, event.first):
            return
        left = self._prompt(record).sampling.max_tokens - len(record.tokens)
        if event.lease is None:
            self._send_decode(record, worker)
        else:
            self._wait(record, Role.DECODE, slots=event.slots + left + len(record.tokens))

    def _decoded(self, worker: Worker, token: m.Sampled) -> None:
        record = self._current(token.request_id, token.attempt)
        if record is None or record.worker != worker.name:
            return
        if record.kv_lease is not None:
            self._release(record.kv_lease)
            record.kv_lease = None
        self._accept(record, token)

    def _accept(self, record: Record, token: m.Sampled) -> bool:
        """Take the next token exactly once; False when the request has ended."""
        if token.seq != len(record.tokens):
            return True
        record.tokens.append(token)
        record.deaths_without_progress = 0
        if record.first_token_at is None:
            record.first_token_at = self.clock()
        if token.finish is None:
            self.updates.append(Update(record.request_id, (token,), record, False))
            return True
        record.finish = token.finish
        self._end(record, State.FINISHED, (token,))
        return False

    # deaths

    def _died(self, event: m.WorkerDied) -> None:
        self._count("worker_deaths")
        if worker := self.workers.get(event.worker):
            blamed = () if event.by_supervisor or worker.is_killed else worker.step
            self._lost(worker, blamed, by_signal=event.signal)

    def _lost(self, worker: Worker, blamed: Iterable[str], by_signal: int = 0) -> None:
        del self.workers[worker.name]
        for request_id in worker.holds.intersection(blamed):
            self._blame(self.records[request_id], by_signal)
        for request_id in sorted(worker.holds):
            if record := self.records.get(request_id):
                self._again(record, worker.name)

    def _blame(self, record: Record, by_signal: int) -> None:
        """A death in its step makes a request a suspect; a second one, alone, makes it poison.

        SIGKILL says little about the request (an operator, the kernel's memory killer), so there the
        limit is `MAX_DEATHS` without progress.
        """
        record.deaths_without_progress += 1
        was_alone, record.is_suspect = record.is_suspect, True
        if record.deaths_without_progress >= MAX_DEATHS or (was_alone and by_signal != SIGKILL):
            self._count("poisoned")
            self.fail(
                record.request_id, RequestPoisoned("This request made a worker die, also when it ran alone")
            )

    def _again(self, record: Record, lost: str) -> None:
        """Repeat only what the lost worker had; what was streamed is forced in the next attempt."""
        self._count("retries")
        if record.state is State.ENCODING:
            for index, item in enumerate(record.items):
                if item.worker == lost:
                    item.worker = None
                    self._wait(record, Role.ENCODE, item=index)
        elif record.worker == lost:
            record.worker = None
            record.attempt += 1
            if record.state is State.PREFILLING:
                self._queue_prefill(record)
            else:
                if record.kv_lease is not None:
                    self._release(record.kv_lease)
                record.kv_lease = record.prefilled = None
                record.items = [Item() for _ in record.items]
                self._start(record)

    # stages

    def _start(self, record: Record) -> None:
        if not record.items:
            self._queue_prefill(record)
            return
        record.state = State.ENCODING
        for index in range(len(record.items)):
            self._wait(record, Role.ENCODE, item=index)

    def _queue_prefill(self, record: Record) -> None:
        record.state = State.PREFILLING
        visual = sum(item.encoded.kept for item in record.items if item.encoded)
        slots = visual + self._text_slots(record)
        if self._check_room(record, slots):
            self._wait(record, Role.PREFILL, slots=slots)

    def _text_slots(self, record: Record) -> int:
        prompt = self._prompt(record)
        return len(prompt.token_ids) - len(prompt.media) + prompt.sampling.max_tokens

    @staticmethod
    def _prompt(record: Record) -> Prompt:
        assert record.prompt is not None, "a record past FETCHING has its prompt"
        return record.prompt

    def _wait(self, record: Record, role: Role, *, item: int | None = None, slots: int = 0) -> None:
        self.waiting.append(Job(record.request_id, record.attempt, role, item, slots, self.clock()))

    def pump(self) -> None:
        """Give waiting jobs, oldest first, to workers that have credit for them."""
        left: deque[Job] = deque()
        for job in self.waiting:
            record = self._current(job.request_id, job.attempt)
            if record is None:
                continue
            worker = choose(job, record, self.workers.values(), self.records)
            if worker is None:
                left.append(job)
                continue
            record.waited_ms += (self.clock() - job.queued_at) * 1e3
            self._dispatch(job, record, worker)
        self.waiting = left

    def _dispatch(self, job: Job, record: Record, worker: Worker) -> None:
        worker.holds.add(record.request_id)
        if job.role is Role.ENCODE:
            assert job.item is not None
            prompt = self._prompt(record)
            record.items[job.item].worker = worker.name
            command = m.EncodeMedia(
                request_id=record.request_id,
                attempt=record.attempt,
                item=job.item,
                media=prompt.media[job.item],
                methods=prompt.methods,
                salt=prompt.salt,
                is_only_image=sum(ref.modality == "image" for ref in prompt.media) == 1,
            )
            self._send(worker, command, 0)
        elif job.role is Role.PREFILL:
            self._send_prefill(record, worker, job.slots)
        else:
            self._send_decode(record, worker, job.slots)

    def _send_prefill(self, record: Record, worker: Worker, slots: int) -> None:
        prompt = self._prompt(record)
        record.worker = worker.name
        command = m.PrefillPrompt(
            request_id=record.request_id,
            attempt=record.attempt,
            token_ids=prompt.token_ids,
            items=tuple(item.encoded for item in record.items if item.encoded),
            sampling=prompt.sampling,
            methods=prompt.methods,
            forced=tuple(token.token_id for token in record.tokens),
            hand_off=Role.DECODE not in worker.roles,
        )
        self._send(worker, command, slots)

    def _send_decode(self, record: Record, worker: Worker, slots: int = 0) -> None:
        assert record.prefilled is not None
        record.worker = worker.name
        command = m.DecodeFrom(
            request_id=record.request_id,
            attempt=record.attempt,
            tokens=tuple(token.token_id for token in record.tokens),
            sampling=self._prompt(record).sampling,
            next_order=record.prefilled.next_order,
            next_position=record.prefilled.next_position,
            lease=record.kv_lease,
        )
        self._send(worker, command, slots)

    def _send(self, worker: Worker, command: m.AnyCommand, slots: int) -> None:
        worker.sent += 1
        worker.unseen.append((worker.sent, slots))
        self._tell(worker, command)

    def _tell(self, worker: Worker, command: m.AnyCommand) -> None:
        self.outbox.append((worker.name, worker.sent, command))

    # endings

    def _end(self, record: Record, state: State, tokens: tuple[m.Sampled, ...] = ()) -> None:
        del self.records[record.request_id]
        record.state = state
        record.ended_at = self.clock()
        self._count(state.value)
        for worker in self.workers.values():
            if record.request_id in worker.holds:
                self._leave(worker, record)
                if state is not State.FINISHED or record.finish is FinishReason.STOP:
                    self._tell(worker, m.CancelRequest(request_id=record.request_id))
        self._release_embeddings(record)
        if record.kv_lease is not None:
            self._release(record.kv_lease)
        self.updates.append(Update(record.request_id, tokens, record, True))

    def _leave(self, worker: Worker, record: Record) -> None:
        worker.holds.discard(record.request_id)
        if worker.reserved_for == record.request_id:
            worker.reserved_for = None

    def _release_embeddings(self, record: Record) -> None:
        for item in record.items:
            if item.encoded is not None:
                self._release(item.encoded.lease)

    def _release(self, lease: m.Lease) -> None:
        """Tell the owner, or leave it to the shell when the owner is gone. Idempotent."""
        owner = self.lease_owner.pop(lease.lease_id, None)
        if owner is None:
            return
        if worker := self.workers.get(owner):
            self._tell(worker, m.ReleaseLease(lease_id=lease.lease_id))
        else:
            self.orphaned.append(lease)

    def _count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    # state that front doors and probes read

    def ready_roles(self) -> set[Role]:
        return {role for worker in self.workers.values() if not worker.is_killed for role in worker.roles}

    def abandon(self, error: MMServeError) -> None:
        """Everything still running fails."""
        for request_id in list(self.records):
            self.fail(request_id, error)
