"""Fake workers around a real dispatcher: messages are delivered in random interleavings, on a fake clock."""

from __future__ import annotations

import random
from signal import SIGKILL

import msgspec

from mmserve import messages as m
from mmserve.messages import Role
from mmserve.request import SEGMENT_FRAMES, FinishReason, MediaRef, MediaReport, Prompt
from mmserve.sampling import SamplingParams
from mmserve.workers.dispatcher import Dispatcher, Update

ANSWER = 5  # tokens of every answer
TEXT = 5  # tokens of every prompt, placeholders included
PARTS = (4, 1, 5)  # kept tokens of the parts of every media item
KEPT = sum(PARTS)
FRAMES = 40
CAPACITY = m.Credits(requests=8, slots=10_000)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _lease(number: int, endpoint: str = "") -> m.Lease:
    return m.Lease(
        lease_id=f"{number:032x}",
        path=f"/run/{number}",
        total_bytes=1,
        arrays=(),
        checksum=0,
        endpoint=endpoint,
    )


class FakeWorker:
    """Answers commands as a real worker would; token `seq` of a request is 100 + seq.

    It counts the slots that it holds, and preempts what it is told to.
    """

    def __init__(self, name: str, *roles: Role, capacity: m.Credits = CAPACITY) -> None:
        self.name = name
        self.roles = roles
        self.endpoint = ""  # where others read its leases
        self.capacity = capacity
        self.held: dict[str, int] = {}
        self.losses = 0  # leases that it cannot read, from now on
        self.unreadable: set[str] = set()  # leases that it cannot read, of prompts
        self.rejects_prompts = False  # preempts each that is whole instead of running it
        self.inbox: list[tuple[int, m.AnyCommand]] = []
        self.encodes: list[tuple[m.EncodeMedia, int]] = []  # with how many parts are published
        self.helps: list[m.EncodeFrames] = []
        self.awaited: dict[tuple[str, int], set[int]] = {}  # frames that others encode, by item
        self.prompts: dict[str, tuple[m.PrefillPrompt, list[int]]] = {}  # with how many parts there are
        self.decodes: dict[str, tuple[m.DecodeFrom, int]] = {}
        self.seen = 0
        self.released: list[str] = []
        self.done: list[m.AnyCommand] = []

    def upward(self, event: m.AnyEvent) -> m.Upward:
        free = m.Credits(
            requests=self.capacity.requests - len(self.held),
            slots=self.capacity.slots - sum(self.held.values()),
        )
        return m.Upward(epoch="", seen=self.seen, credits=free, event=event)

    def preempt(self, name: str) -> m.RequestPreempted:
        """Whatever it does with the request."""
        command = self.prompts.pop(name)[0] if name in self.prompts else self.decodes.pop(name)[0]
        self.held.pop(name, None)
        return m.RequestPreempted(request_id=name, attempt=command.attempt)

    def step(self, number: int) -> list[m.AnyEvent]:
        """Handle one waiting command, or encode one part, or decode one token for all running requests."""
        if self.inbox:
            self.seen, command = self.inbox.pop(0)
            self.done.append(command)
            return self._handle(command, number)
        if self.helps:
            return [self._help(number)]
        if encoded := self._encode(number):
            return [encoded]
        tokens = []
        for name, (command, seq) in list(self.decodes.items()):
            finish = FinishReason.LENGTH if seq + 1 == command.sampling.max_tokens else None
            tokens.append(
                m.Sampled(
                    request_id=name, attempt=command.attempt, seq=seq, token_id=100 + seq, finish=finish
                )
            )
            self.decodes[name] = (command, seq + 1)
            if finish:
                del self.decodes[name]
                self.held.pop(name, None)
        return [m.TokensDecoded(tokens=tuple(tokens))] if tokens else []

    def _lose(self, command: m.AnyCommand) -> list[m.AnyEvent]:
        """What it says of a command whose lease it cannot read; it has nothing of the request then."""
        lease: m.Lease | None = None
        if isinstance(command, m.PrefillPrompt):
            leases = [part.lease for item in command.items for part in item.parts]
            lease = next((one for one in leases if one.lease_id in self.unreadable or self.losses), None)
        elif isinstance(command, m.ExtendPrompt) and command.request_id in self.prompts:
            lease = command.part.lease
        elif isinstance(command, m.DecodeFrom):
            lease = command.lease
        if lease is None or not (self.losses or lease.lease_id in self.unreadable):
            return []
        assert isinstance(command, m.PrefillPrompt | m.ExtendPrompt | m.DecodeFrom)
        self.losses = max(self.losses - 1, 0)
        self.prompts.pop(command.request_id, None)
        self.held.pop(command.request_id, None)
        return [m.LeaseLost(request_id=command.request_id, attempt=command.attempt, lease_id=lease.lease_id)]

    def _handle(self, command: m.AnyCommand, number: int) -> list[m.AnyEvent]:
        if lost := self._lose(command):
            return lost
        if isinstance(command, m.EncodeMedia):
            self.encodes.append((command, 0))
            return [
                m.MediaPlanned(
                    request_id=command.request_id,
                    attempt=command.attempt,
                    item=command.item,
                    keep_bound=KEPT,
                    missing=tuple(range(FRAMES)),
                )
            ]
        if isinstance(command, m.EncodeFrames):
            self.helps.append(command)
        elif isinstance(command, m.AwaitFrames):
            self.awaited[command.request_id, command.item] = set(command.positions)
        elif isinstance(command, m.TakeFrames):
            left = self.awaited.get((command.request_id, command.item), set())
            assert left.issuperset(command.frames.positions), "frames came twice, or to somebody else"
            left.difference_update(command.frames.positions)
        if isinstance(command, m.ExtendPrompt):
            return self._extend(command, number)
        if isinstance(command, m.PrefillPrompt):
            visual = sum(item.keep_bound for item in command.items)
            slots = len(command.token_ids) - len(command.items) + visual
            if not command.hand_off:
                answer = m.answer_slots(command.sampling, len(command.forced))
                self.held[command.request_id] = slots + answer
            self.prompts[command.request_id] = command, [len(item.parts) for item in command.items]
            return self._prefill(command.request_id, number)
        if isinstance(command, m.DecodeFrom):
            assert list(command.tokens) == [100 + seq for seq in range(len(command.tokens))]
            self.decodes[command.request_id] = (command, len(command.tokens))
            if command.lease is not None:
                answer = m.answer_slots(command.sampling, len(command.tokens))
                self.held[command.request_id] = command.next_position + answer
        elif isinstance(command, m.CancelRequest):
            self.encodes = [one for one in self.encodes if one[0].request_id != command.request_id]
            self.helps = [one for one in self.helps if one.request_id != command.request_id]
            self.awaited = {key: left for key, left in self.awaited.items() if key[0] != command.request_id}
            self.prompts.pop(command.request_id, None)
            self.decodes.pop(command.request_id, None)
            self.held.pop(command.request_id, None)
        elif isinstance(command, m.ReleaseLease):
            self.released.append(command.lease_id)
        return []

    def _help(self, number: int) -> m.FramesEncoded:
        """The next segment of frames for another worker."""
        command = self.helps.pop(0)
        now, later = command.positions[:SEGMENT_FRAMES], command.positions[SEGMENT_FRAMES:]
        if later:
            self.helps.insert(0, msgspec.structs.replace(command, positions=later))
        return m.FramesEncoded(
            request_id=command.request_id,
            attempt=command.attempt,
            item=command.item,
            frames=m.EncodedFrames(positions=now, lost=(), lease=_lease(number)),
            is_last=not later,
        )

    def _encode(self, number: int) -> m.MediaEncoded | None:
        """The next part of what waits longest and not for others."""
        index = next((i for i, one in enumerate(self.encodes) if not self._is_held_up(*one)), None)
        if index is None:
            return None
        command, count = self.encodes[index]
        is_last = count + 1 == len(PARTS)
        if is_last:
            del self.encodes[index]
            self.awaited.pop((command.request_id, command.item), None)
        else:
            self.encodes[index] = command, count + 1
        report = MediaReport(source="x", frames=1, timestamps_s=(0.0,), lost_frames=0, width=1, height=1)
        times = m.EncodeTimes(queue=0, decode=1, preprocess=1, encode=1, prune=0, publish=0)
        whole = m.EncodedMedia(cached_tokens=0, report=report, times=times)
        return m.MediaEncoded(
            request_id=command.request_id,
            attempt=command.attempt,
            item=command.item,
            part=m.EncodedPart(lease=_lease(number, self.endpoint), tokens=12, kept=PARTS[count]),
            whole=whole if is_last else None,
        )

    def _is_held_up(self, command: m.EncodeMedia, count: int) -> bool:
        return count + 1 == len(PARTS) and bool(self.awaited.get((command.request_id, command.item)))

    def _extend(self, command: m.ExtendPrompt, number: int) -> list[m.AnyEvent]:
        if command.request_id not in self.prompts:
            return []  # preempted
        prompt, parts = self.prompts[command.request_id]
        assert prompt.attempt == command.attempt
        assert command.part.kept == PARTS[parts[command.item]], "a part is missing, or came twice"
        parts[command.item] += 1
        assert command.is_last == (parts[command.item] == len(PARTS))
        return self._prefill(command.request_id, number)

    def _prefill(self, name: str, number: int) -> list[m.AnyEvent]:
        """Nothing until the prompt is whole."""
        command, parts = self.prompts[name]
        if any(count < len(PARTS) for count in parts):
            return []
        del self.prompts[name]
        if self.rejects_prompts:
            self.held.pop(name, None)
            return [m.RequestPreempted(request_id=name, attempt=command.attempt)]
        slots = len(command.token_ids) + (KEPT - 1) * len(command.items)
        first = None
        if not command.forced:
            first = m.Sampled(request_id=name, attempt=command.attempt, seq=0, token_id=100)
        return [
            m.PromptPrefilled(
                request_id=name,
                attempt=command.attempt,
                first=first,
                lease=_lease(number, self.endpoint) if command.hand_off else None,
                next_order=40,
                next_position=slots,
                slots=slots,
                kv_bytes=1,
                kv_bytes_uncompressed=2,
                queue_ms=0,
                transfer_ms=0,
                prefill_ms=1,
            )
        ]


class World:
    """A dispatcher with fake workers whose messages are delivered in random interleavings."""

    def __init__(
        self, *roles: tuple[Role, ...], seed: int = 0, max_active: int = 1000, slots: int = 10_000
    ) -> None:
        self.clock = FakeClock()
        self.dispatcher = Dispatcher(clock=self.clock, max_active=max_active, deadline_s=60)
        self.rng = random.Random(seed)
        self.workers: dict[str, FakeWorker] = {}
        self.generation = 0
        self.number = 0
        self.updates: list[Update] = []
        self.capacity = m.Credits(requests=8, slots=slots)
        for slot, these in enumerate(roles):
            self.start(these, slot)

    def start(self, roles: tuple[Role, ...], slot: int = 0) -> FakeWorker:
        self.generation += 1
        worker = FakeWorker(f"{roles[0]}-{slot}-{self.generation}", *roles, capacity=self.capacity)
        self.workers[worker.name] = worker
        ready = m.WorkerReady(roles=roles, pid=1, weights_revision="w", capacity=self.capacity)
        self.dispatcher.handle(worker.name, worker.upward(ready))
        return worker

    def submit(self, media: int = 1, *, priority: int = 0, text: int = TEXT, max_tokens: int = ANSWER) -> str:
        name = self.dispatcher.admit()
        refs = tuple(
            MediaRef(modality="video", path=f"/m/{i}", digest=f"{i}", source=f"{i}") for i in range(media)
        )
        prompt = Prompt(
            token_ids=tuple(range(text)),
            media=refs,
            sampling=SamplingParams(max_tokens=max_tokens),
            priority=priority,
        )
        self.dispatcher.submit(name, prompt)
        self.deliver()
        return name

    def deliver(self) -> None:
        while self.dispatcher.outbox:
            name, number, command = self.dispatcher.outbox.popleft()
            if name in self.workers:
                self.workers[name].inbox.append((number, command))
        while self.dispatcher.updates:
            self.updates.append(self.dispatcher.updates.popleft())

    def step(self, worker: FakeWorker) -> None:
        self.number += 1
        self.clock.now += 0.001
        for event in worker.step(self.number):
            self.dispatcher.handle(worker.name, worker.upward(event))
        self.deliver()

    def role(self, role: Role) -> FakeWorker:
        return next(worker for worker in self.workers.values() if role in worker.roles)

    def decode_until(self, name: str, tokens: int) -> FakeWorker:
        """Everybody works until the request has so many tokens; then its decode worker."""
        for _ in range(1000):
            if len(self.dispatcher.records[name].tokens) >= tokens:
                return next(worker for worker in self.workers.values() if name in worker.decodes)
            self.step(self.rng.choice(list(self.workers.values())))
        raise AssertionError(f"no {tokens} tokens of {name}")

    def preempt(self, worker: FakeWorker, name: str) -> m.RequestPreempted:
        event = worker.preempt(name)
        self.dispatcher.handle(worker.name, worker.upward(event))
        self.deliver()
        return event

    def kill(self, worker: FakeWorker, *, step: tuple[str, ...] = (), signal: int = SIGKILL) -> None:
        if step:
            self.dispatcher.handle(worker.name, worker.upward(m.StepStarted(requests=step, bound_s=1.0)))
        del self.workers[worker.name]
        died = m.WorkerDied(worker=worker.name, signal=signal, by_supervisor=False)
        self.dispatcher.handle(
            "supervisor", m.Upward(epoch="", seen=0, credits=m.Credits(requests=0), event=died)
        )
        self.deliver()
        self.start(worker.roles, int(worker.name.split("-")[1]))
        self.deliver()

    def run(self, steps: int = 3000) -> None:
        for _ in range(steps):
            if not self.dispatcher.records:
                return
            self.step(self.rng.choice(list(self.workers.values())))
        raise AssertionError(f"still running: {self.dispatcher.records}")

    def settle(self) -> None:
        """Every worker reads what it was sent."""
        for worker in self.workers.values():
            while worker.inbox:
                self.step(worker)

    def finals(self) -> dict[str, Update]:
        finals = [update for update in self.updates if update.is_final]
        assert len({f.request_id for f in finals}) == len(finals), "a request ended twice"
        return {update.request_id: update for update in finals}

    def tokens(self, name: str) -> list[int]:
        return [token.token_id for u in self.updates if u.request_id == name for token in u.tokens]


EPD = ((Role.ENCODE,), (Role.PREFILL,), (Role.DECODE,))
EEPD = ((Role.ENCODE,), *EPD)
TOGETHER = ((Role.ENCODE, Role.PREFILL, Role.DECODE),)
WHOLE = [100 + seq for seq in range(ANSWER)]
