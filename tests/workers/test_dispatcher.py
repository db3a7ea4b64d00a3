"""The dispatcher as a pure state machine: fake workers, fake clock, every death at every moment."""

from __future__ import annotations

import random
from signal import SIGKILL, SIGSEGV

import pytest

from mmserve import messages as m
from mmserve.errors import Overloaded
from mmserve.messages import Role
from mmserve.request import FinishReason, MediaRef, MediaReport, Prompt
from mmserve.sampling import SamplingParams
from mmserve.workers.dispatcher import Dispatcher, Update
from mmserve.workers.records import State

ANSWER = 5  # tokens of every answer


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _lease(number: int) -> m.Lease:
    return m.Lease(lease_id=f"{number:032x}", path=f"/run/{number}", total_bytes=1, arrays=(), checksum=0)


class FakeWorker:
    """Answers commands as a real worker would; token `seq` of a request is 100 + seq."""

    def __init__(self, name: str, *roles: Role) -> None:
        self.name = name
        self.roles = roles
        self.inbox: list[tuple[int, m.AnyCommand]] = []
        self.decodes: dict[str, tuple[m.DecodeFrom, int]] = {}
        self.seen = 0
        self.released: list[str] = []
        self.done: list[m.AnyCommand] = []

    def upward(self, event: m.AnyEvent) -> m.Upward:
        return m.Upward(epoch="", seen=self.seen, credits=m.Credits(requests=8, slots=10_000), event=event)

    def step(self, number: int) -> list[m.AnyEvent]:
        """Handle one waiting command, or decode one token for all running requests."""
        if self.inbox:
            self.seen, command = self.inbox.pop(0)
            self.done.append(command)
            return self._handle(command, number)
        tokens = []
        for name, (command, seq) in list(self.decodes.items()):
            finish = FinishReason.LENGTH if seq + 1 == ANSWER else None
            tokens.append(
                m.Sampled(
                    request_id=name, attempt=command.attempt, seq=seq, token_id=100 + seq, finish=finish
                )
            )
            self.decodes[name] = (command, seq + 1)
            if finish:
                del self.decodes[name]
        return [m.TokensDecoded(tokens=tuple(tokens))] if tokens else []

    def _handle(self, command: m.AnyCommand, number: int) -> list[m.AnyEvent]:
        if isinstance(command, m.EncodeMedia):
            report = MediaReport(source="x", frames=1, timestamps_s=(0.0,), lost_frames=0, width=1, height=1)
            times = m.EncodeTimes(queue=0, decode=1, preprocess=1, encode=1, prune=0, publish=0)
            return [
                m.MediaEncoded(
                    request_id=command.request_id,
                    attempt=command.attempt,
                    item=command.item,
                    encoded=m.EncodedItem(lease=_lease(number), tokens=37, kept=10),
                    cached_tokens=0,
                    report=report,
                    times=times,
                )
            ]
        if isinstance(command, m.PrefillPrompt):
            first = None
            if not command.forced:
                first = m.Sampled(request_id=command.request_id, attempt=command.attempt, seq=0, token_id=100)
            return [
                m.PromptPrefilled(
                    request_id=command.request_id,
                    attempt=command.attempt,
                    first=first,
                    lease=_lease(number) if command.hand_off else None,
                    next_order=40,
                    next_position=13,
                    slots=13,
                    kv_bytes=1,
                    kv_bytes_uncompressed=2,
                    queue_ms=0,
                    transfer_ms=0,
                    prefill_ms=1,
                )
            ]
        if isinstance(command, m.DecodeFrom):
            self.decodes[command.request_id] = (command, len(command.tokens))
        elif isinstance(command, m.CancelRequest):
            self.decodes.pop(command.request_id, None)
        elif isinstance(command, m.ReleaseLease):
            self.released.append(command.lease_id)
        return []


class World:
    """A dispatcher with fake workers whose messages are delivered in random interleavings."""

    def __init__(self, *roles: tuple[Role, ...], seed: int = 0, max_active: int = 1000) -> None:
        self.clock = FakeClock()
        self.dispatcher = Dispatcher(clock=self.clock, max_active=max_active, deadline_s=60)
        self.rng = random.Random(seed)
        self.workers: dict[str, FakeWorker] = {}
        self.generation = 0
        self.number = 0
        self.updates: list[Update] = []
        for these in roles:
            self.start(these)

    def start(self, roles: tuple[Role, ...]) -> FakeWorker:
        self.generation += 1
        worker = FakeWorker(f"{roles[0]}-0-{self.generation}", *roles)
        self.workers[worker.name] = worker
        ready = m.WorkerReady(
            roles=roles, pid=1, weights_revision="w", capacity=m.Credits(requests=8, slots=10_000)
        )
        self.dispatcher.handle(worker.name, worker.upward(ready))
        return worker

    def submit(self, media: int = 1) -> str:
        name = self.dispatcher.admit()
        refs = tuple(
            MediaRef(modality="video", path=f"/m/{i}", digest=f"{i}", source=f"{i}") for i in range(media)
        )
        prompt = Prompt(token_ids=tuple(range(5)), media=refs, sampling=SamplingParams(max_tokens=ANSWER))
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

    def kill(self, worker: FakeWorker, *, step: tuple[str, ...] = (), signal: int = SIGKILL) -> None:
        if step:
            self.dispatcher.handle(worker.name, worker.upward(m.StepStarted(requests=step, bound_s=1.0)))
        del self.workers[worker.name]
        died = m.WorkerDied(worker=worker.name, signal=signal, by_supervisor=False)
        self.dispatcher.handle(
            "supervisor", m.Upward(epoch="", seen=0, credits=m.Credits(requests=0), event=died)
        )
        self.deliver()
        self.start(worker.roles)
        self.deliver()

    def run(self, steps: int = 3000) -> None:
        for _ in range(steps):
            if not self.dispatcher.records:
                return
            self.step(self.rng.choice(list(self.workers.values())))
        raise AssertionError(f"still running: {self.dispatcher.records}")

    def finals(self) -> dict[str, Update]:
        finals = [update for update in self.updates if update.is_final]
        assert len({f.request_id for f in finals}) == len(finals), "a request ended twice"
        return {update.request_id: update for update in finals}

    def tokens(self, name: str) -> list[int]:
        return [token.token_id for u in self.updates if u.request_id == name for token in u.tokens]


EPD = ((Role.ENCODE,), (Role.PREFILL,), (Role.DECODE,))
TOGETHER = ((Role.ENCODE, Role.PREFILL, Role.DECODE),)
WHOLE = [100 + seq for seq in range(ANSWER)]


@pytest.mark.parametrize("roles", [EPD, TOGETHER], ids=["epd", "colocated"])
@pytest.mark.parametrize("media", [0, 1, 3])
def test_requests_finish_with_every_token_once_and_all_leases_released(
    roles: tuple[tuple[Role, ...], ...], media: int
) -> None:
    world = World(*roles, seed=media)
    names = [world.submit(media) for _ in range(6)]
    world.run()
    assert {world.finals()[name].record.state for name in names} == {State.FINISHED}
    assert all(world.tokens(name) == WHOLE for name in names)
    for worker in world.workers.values():
        for _ in range(40):
            world.step(worker)
    assert not world.dispatcher.lease_owner


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_a_killed_worker_loses_nothing_whenever_it_dies(victim: int, seed: int) -> None:
    world = World(*EPD, seed=seed)
    names = [world.submit(2) for _ in range(8)]
    for _ in range(seed * 3):
        world.step(world.rng.choice(list(world.workers.values())))
    worker = next(w for w in world.workers.values() if w.roles == EPD[victim])
    running = tuple(world.dispatcher.workers[worker.name].holds)
    world.kill(worker, step=running)
    world.run(20_000)
    assert {world.finals()[name].record.state for name in names} == {State.FINISHED}
    assert all(world.tokens(name) == WHOLE for name in names)
    assert not world.dispatcher.waiting


def test_a_suspect_runs_alone_and_is_poison_when_it_dies_again() -> None:
    world = World(*EPD)
    bad, good = world.submit(), world.submit()
    decode = next(w for w in world.workers.values() if w.roles == EPD[2])
    while not {bad, good} <= set(world.dispatcher.workers[decode.name].holds):
        world.step(world.rng.choice([w for w in world.workers.values() if w is not decode]))
    world.kill(decode, step=(bad, good), signal=SIGSEGV)
    for _ in range(200):
        decode = next(w for w in world.workers.values() if w.roles == EPD[2])
        holds = world.dispatcher.workers[decode.name].holds
        assert len(holds) <= 1, "a suspect shares a worker"
        if bad in holds:
            break
        world.step(world.rng.choice(list(world.workers.values())))
    world.kill(decode, step=(bad,), signal=SIGSEGV)
    world.run()
    finals = world.finals()
    assert finals[bad].record.state is State.FAILED
    error = finals[bad].record.error
    assert error is not None
    assert error.code == "request_poisoned"
    assert finals[good].record.state is State.FINISHED


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_cancel_at_any_moment_ends_once_and_frees_everything(steps: int) -> None:
    world = World(*EPD, seed=steps)
    name = world.submit(2)
    for _ in range(steps):
        world.step(world.rng.choice(list(world.workers.values())))
    world.dispatcher.cancel(name)
    world.dispatcher.cancel(name)
    world.deliver()
    for _ in range(60):
        world.step(world.rng.choice(list(world.workers.values())))
    assert world.finals()[name].record.state in (State.CANCELLED, State.FINISHED)
    assert not any(worker.decodes for worker in world.workers.values())
    assert not world.dispatcher.lease_owner
    assert all(not worker.holds for worker in world.dispatcher.workers.values())


def test_admission_is_bounded() -> None:
    world = World(*EPD, max_active=2)
    world.submit()
    world.submit()
    with pytest.raises(Overloaded):
        world.dispatcher.admit()


def test_a_request_past_its_deadline_fails() -> None:
    world = World()
    name = world.submit()
    world.clock.now = 61.0
    world.dispatcher.tick()
    world.deliver()
    error = world.finals()[name].record.error
    assert error is not None
    assert error.status == 504


def test_a_silent_worker_is_killed_and_nobody_is_blamed() -> None:
    world = World(*EPD)
    name = world.submit(0)
    decode = next(w for w in world.workers.values() if w.roles == EPD[1])
    world.dispatcher.handle(decode.name, decode.upward(m.StepStarted(requests=(name,), bound_s=10.0)))

    def wait(seconds: int) -> list[str]:
        for _ in range(seconds):
            world.clock.now += 1.0
            world.dispatcher.tick()
        return [c.worker for _, _, c in world.dispatcher.outbox if isinstance(c, m.KillWorker)]

    assert decode.name not in wait(12)
    orders = wait(2)
    assert decode.name in orders
    world.kill(decode, signal=SIGKILL)
    assert not world.dispatcher.records[name].is_suspect


def test_a_suspended_dispatcher_kills_nobody() -> None:
    world = World(*EPD)
    world.clock.now += 60.0
    world.dispatcher.tick()
    assert not [c for _, _, c in world.dispatcher.outbox if isinstance(c, m.KillWorker)]


def test_timings_sum_to_the_time_to_first_token() -> None:
    world = World(*EPD)
    name = world.submit(3)
    world.run()
    times = world.finals()[name].record.timings()
    parts = (
        times.fetch
        + times.decode
        + times.preprocess
        + times.encode
        + times.prune
        + times.transfer
        + times.queue
        + times.prefill
        + times.other
    )
    assert parts == pytest.approx(times.ttft)
    assert times.ttft + times.generate == pytest.approx(times.total)


def test_an_event_of_another_epoch_changes_nothing() -> None:
    world = World(*EPD)
    name = world.submit(0)
    prefill = next(w for w in world.workers.values() if w.roles == EPD[1])
    failure = m.RequestFailed(request_id=name, attempt=0, code="media_error", public_message="x")
    stale = m.Upward(epoch="other", seen=0, credits=m.Credits(requests=1), event=failure)
    world.dispatcher.handle(prefill.name, stale)
    assert name in world.dispatcher.records
