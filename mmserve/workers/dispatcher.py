"""The dispatcher: decides which worker does what next, and that every request ends exactly once.

Pure Python with an injected clock: events and calls go in, commands collect in `outbox`, news for
clients in `updates`. Knows nothing about sockets, processes, tensors or HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable

import msgspec

from mmserve import messages as m
from mmserve.errors import (
    DeadlineExceeded,
    MMServeError,
    Overloaded,
    RequestPoisoned,
    Unavailable,
    from_code,
)
from mmserve.messages import Role
from mmserve.request import FinishReason, Prompt
from mmserve.workers import commands
from mmserve.workers.ledger import Update as Update
from mmserve.workers.records import MAX_LOSSES, Item, Record, State, Worker
from mmserve.workers.routing import Job, choose, holds_back
from mmserve.workers.sharing import Sharing

HEARTBEAT_S = 1.0
LIVENESS = 3  # missed heartbeats until a silent worker is killed
SUPERVISOR = "supervisor"


class Dispatcher(Sharing):
    """Takes calls and events, moves requests from stage to stage, and hands out waiting jobs.

    `pump` drops the jobs of ended records and old attempts.
    """

    def __init__(self, *, clock: Callable[[], float], max_active: int, deadline_s: float) -> None:
        super().__init__(clock)
        self.max_active = max_active
        self.deadline_s = deadline_s
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
        self._count("admitted")
        self.records[request_id] = Record(
            request_id=request_id, admitted_at=now, deadline_at=deadline, arrival=self.counts["admitted"]
        )
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
            self._fail(record, error)
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
            self._planned(worker, event)
        elif isinstance(event, m.MediaEncoded):
            self._encoded(worker, event)
        elif isinstance(event, m.FramesEncoded):
            self._frames_encoded(worker, event)
        elif isinstance(event, m.PromptPrefilled):
            self._prefilled(worker, event)
        elif isinstance(event, m.TokensDecoded):
            for token in event.tokens:
                self._decoded(worker, token)
        elif isinstance(event, m.RequestFailed):
            record = self._current(event.request_id, event.attempt)
            if record is not None:
                self._fail(record, from_code(event.code, event.public_message))
        elif isinstance(event, m.RequestPreempted):
            self._preempted(worker, event)
        elif isinstance(event, m.LeaseLost):
            self._unread(worker, event)
        elif isinstance(event, m.LeasesEvicted):
            for lease_id in event.lease_ids:
                self.lease_owner.pop(lease_id, None)
            self._evicted(event.lease_ids)
        elif isinstance(event, m.WorkCounted):
            self.work[worker.name] = event
        elif isinstance(event, m.StepStarted):
            worker.step, worker.step_bound_s = event.requests, event.bound_s

    def _planned(self, worker: Worker, event: m.MediaPlanned) -> None:
        record = self._current(event.request_id, event.attempt)
        if record is None:
            return
        item = record.items[event.item]
        item.keep_bound, item.lasting_bound = event.keep_bound, event.lasting_bound
        item.frame_rows = event.frame_rows
        bounds = [item.most_lasting for item in record.items if item.keep_bound is not None]
        slots = sum(bounds) + record.text_slots + record.submitted.sampling.max_tokens
        if self._check_room(record, Role.PREFILL, slots):
            self._share(record, worker, event)
            self._prefill_if_ready(record)

    def _encoded(self, worker: Worker, event: m.MediaEncoded) -> None:
        """The next part of an item: prefill begins with the first, the others follow it."""
        self.lease_owner[event.part.lease.lease_id] = worker.name
        record = self._current(event.request_id, event.attempt)
        item = record.items[event.item] if record is not None else None
        if record is None or item is None or item.worker != worker.name:
            self._release(event.part.lease)
            return
        item.parts.append(event.part)
        if event.whole is not None:
            item.whole, item.worker = event.whole, None
            while item.lent:
                self._release(item.lent.pop())
            self._leave_if_done(worker, record)
        if record.state is State.ENCODING:
            self._prefill_if_ready(record)
        elif record.worker is not None:
            self._tell(self.workers[record.worker], commands.extend_prompt(event))

    def _prefill_if_ready(self, record: Record) -> None:
        if record.state is State.ENCODING and record.can_prefill:
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
        record.take_prefilled(event)
        if event.lease is not None:
            record.worker = None
            self._leave(worker, record)
        if event.first is not None and not self._accept(record, event.first):
            return
        if event.lease is None:
            self._send(worker, commands.decode_from(record))
        else:
            self._wait(record, Role.DECODE, prompt_slots=event.slots)

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
        record.deaths_without_progress = record.losses_without_progress = 0
        if record.first_token_at is None:
            record.first_token_at = self.clock()
        if token.finish is None:
            self.updates.append(Update(record.request_id, (token,), record, False))
            return True
        record.finish = token.finish
        self._end(record, State.FINISHED, (token,))
        return False

    # losses, preemptions and deaths

    def _unread(self, worker: Worker, event: m.LeaseLost) -> None:
        """A worker found nothing to read where embeddings or KV should be."""
        if record := self._given_up(worker, event):
            # one death loses many: they are not found one by one, each for a loss of its own
            self._make_again(record, {event.lease_id, *self._gone_of(record)})

    def _evicted(self, lease_ids: Iterable[str]) -> None:
        """Who has not sent them to a reader yet does not wait until that one finds out."""
        gone = set(lease_ids)
        for record in list(self.records.values()):
            if record.worker is None and gone.intersection(lease.lease_id for lease in record.leases):
                self._make_again(record, gone)

    def _make_again(self, record: Record, gone: set[str]) -> None:
        """Encode what was lost once more: out of the cache, if it is still there."""
        self._count("lost_leases")
        record.losses_without_progress += 1
        if record.losses_without_progress > MAX_LOSSES:
            text = f"What was encoded for this request was lost {record.losses_without_progress} times"
            self._fail(record, Unavailable(text))
            return
        if record.state is not State.PREFILLING or not record.is_encoded:
            self._count("re_encoded", len(record.items))
            self._restart(record)
            return
        record.attempt += 1
        record.state = State.ENCODING
        for index, item in enumerate(record.items):
            if gone.intersection(part.lease.lease_id for part in item.parts):
                self._count("re_encoded")
                self._release_parts(item)
                record.items[index] = Item()
                self._wait(record, Role.ENCODE, item=index)

    def _preempted(self, worker: Worker, event: m.RequestPreempted) -> None:
        """The worker forgot it for lack of pages: the path of a lost worker, but nobody is blamed."""
        if record := self._given_up(worker, event):
            self._count("preempted")
            self._restart(record)

    def _died(self, event: m.WorkerDied) -> None:
        self._count("worker_deaths")
        if worker := self.workers.get(event.worker):
            blamed = () if event.by_supervisor or worker.is_killed else worker.step
            self._lost(worker, blamed, by_signal=event.signal)

    def _lost(self, worker: Worker, blamed: Iterable[str], by_signal: int = 0) -> None:
        del self.workers[worker.name]
        self._forget_work(worker.name)
        for request_id in worker.holds.intersection(blamed):
            suspect = self.records[request_id]
            if suspect.blame(by_signal):
                self._count("poisoned")
                text = "This request made a worker die, also when it ran alone"
                self._fail(suspect, RequestPoisoned(text))
        for request_id in sorted(worker.holds):
            if record := self.records.get(request_id):
                self._again(record, worker.name)
        self._evicted(self._served_by(worker.name))

    def _again(self, record: Record, lost: str) -> None:
        """Repeat only what the lost worker had."""
        self._count("retries")
        if record.is_suspect and record.state in (State.ENCODING, State.PREFILLING):
            self._restart(record)  # alone, from now on
            return
        self._take_back(record, lost)
        if record.state is State.ENCODING and not any(item.helpers for item in record.items):
            for index, item in enumerate(record.items):
                if item.worker == lost:
                    self._release_parts(item)
                    record.items[index] = Item()
                    self._wait(record, Role.ENCODE, item=index)
        elif record.worker == lost or any(item.worker == lost for item in record.items):
            self._restart(record)

    def _restart(self, record: Record) -> None:
        """A new attempt, in which what was streamed is forced. Embeddings are kept until prefill ends."""
        record.worker = None
        record.attempt += 1
        # what comes of an earlier attempt is not wanted any more
        self._recall(record)
        if record.state is State.PREFILLING and record.is_encoded:
            self._queue_prefill(record)
            return
        # parts of an item belong together
        self._release_embeddings(record)
        if record.kv_lease is not None:
            self._release(record.kv_lease)
        record.kv_lease = record.prefilled = None
        record.items = [Item() for _ in record.items]
        self._start(record)

    # stages

    def pump(self) -> None:
        """Give waiting jobs, in their turn, to workers that have credit for them."""
        left: list[Job] = []
        held_back: set[Role] = set()
        for job in self.waiting:
            record = self._current(job.request_id, job.attempt)
            if record is None or not self._check_room(record, job.role, job.most_slots):
                continue
            worker = None
            if job.role not in held_back:
                worker = choose(job, record, self.workers.values(), self.records)
            if worker is None:
                left.append(job)
                if holds_back(job, record):
                    held_back.add(job.role)
                continue
            if record.first_token_at is None:
                record.waited_ms += (self.clock() - job.queued_at) * 1e3
            self._dispatch(job, record, worker)
        self.waiting = left

    def _dispatch(self, job: Job, record: Record, worker: Worker) -> None:
        worker.holds.add(record.request_id)
        if job.item is not None:
            record.items[job.item].worker = worker.name
            self._send(worker, commands.encode_media(record, job.item))
            return
        record.worker = worker.name
        if job.role is Role.PREFILL:
            hand_off = Role.DECODE not in worker.roles
            self._send(worker, commands.prefill_prompt(record, hand_off=hand_off), job.slots)
        else:
            self._send(worker, commands.decode_from(record), job.slots)

    # state that front doors and probes read

    def abandon(self, error: MMServeError) -> None:
        """Everything still running fails."""
        for request_id in list(self.records):
            self.fail(request_id, error)
