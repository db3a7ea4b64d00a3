"""The dispatcher as a pure state machine: fake workers, fake clock, every death at every moment."""

from __future__ import annotations

from signal import SIGKILL, SIGSEGV

import pytest

from mmserve import messages as m
from mmserve.errors import Overloaded
from mmserve.messages import Role
from mmserve.workers.records import State
from tests.workers.world import EEPD, EPD, KEPT, TOGETHER, WHOLE, FakeWorker, World


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


def test_prefill_begins_with_the_first_part_and_is_sent_the_others() -> None:
    world = World(*EPD)
    encode, prefill = world.role(Role.ENCODE), world.role(Role.PREFILL)
    name = world.submit(2)
    while not prefill.inbox:
        world.step(encode)
    world.step(prefill)
    (command,) = [c for c in prefill.done if isinstance(c, m.PrefillPrompt)]
    assert [len(item.parts) for item in command.items] == [1, 0], "every item is planned, the first begun"
    assert [item.keep_bound for item in command.items] == [KEPT, KEPT]
    world.run()
    sent = [(c.item, c.is_last) for c in prefill.done if isinstance(c, m.ExtendPrompt)]
    assert sent == [(0, False), (0, True), (1, False), (1, False), (1, True)]
    assert world.tokens(name) == WHOLE
    assert world.dispatcher.counts.get("retries", 0) == 0


@pytest.mark.parametrize("victim", [Role.ENCODE, Role.PREFILL])
def test_a_death_while_a_prompt_grows_begins_it_anew(victim: Role) -> None:
    world = World(*EPD)
    encode, prefill = world.role(Role.ENCODE), world.role(Role.PREFILL)
    name = world.submit(1)
    while name not in prefill.prompts:
        world.step(world.rng.choice([encode, prefill]))
    world.kill(world.role(victim))
    survivor = prefill if victim is Role.ENCODE else encode
    assert any(isinstance(c, m.CancelRequest) for _, c in survivor.inbox)
    world.run()
    assert world.tokens(name) == WHOLE
    assert world.finals()[name].record.attempt == 1
    world.settle()
    assert not world.dispatcher.lease_owner


def encoders(world: World) -> tuple[FakeWorker, FakeWorker]:
    """The owner of what was submitted, and the other one."""
    one, two = (worker for worker in world.workers.values() if Role.ENCODE in worker.roles)
    return (one, two) if one.inbox else (two, one)


def test_an_idle_encode_worker_takes_half_of_a_long_video() -> None:
    world = World(*EEPD)
    name = world.submit(1)
    owner, helper = encoders(world)
    world.step(owner)
    world.step(helper)
    (help_wanted,) = [c for c in helper.done if isinstance(c, m.EncodeFrames)]
    assert help_wanted.positions == tuple(range(24, 40))
    world.run()
    (left,) = [c for c in owner.done if isinstance(c, m.AwaitFrames)]
    assert left.positions == help_wanted.positions
    taken = [p for c in owner.done if isinstance(c, m.TakeFrames) for p in c.frames.positions]
    assert taken == list(help_wanted.positions)
    assert world.tokens(name) == WHOLE
    world.settle()
    assert not world.dispatcher.lease_owner


def test_a_busy_encode_worker_is_not_asked_for_help() -> None:
    world = World(*EEPD)
    names = [world.submit(1) for _ in range(4)]
    owner, helper = encoders(world)
    world.dispatcher.workers[helper.name].holds.add(names[0])
    world.step(owner)
    assert not helper.inbox


def test_what_a_dead_helper_had_is_its_owners_again() -> None:
    world = World(*EEPD)
    name = world.submit(1)
    owner, helper = encoders(world)
    world.step(owner)
    for _ in range(2):
        world.step(helper)
    world.kill(helper)
    world.settle()
    last = [c for c in owner.done if isinstance(c, m.AwaitFrames)][-1]
    assert last.positions == ()
    world.run()
    assert world.finals()[name].record.attempt == 0
    assert world.tokens(name) == WHOLE


@pytest.mark.parametrize("seed", range(40))
def test_deaths_and_cancels_among_helping_workers_lose_nothing(seed: int) -> None:
    world = World(*EEPD, seed=seed)
    names = [world.submit(1 + number % 2) for number in range(6)]
    for step in range(300):
        world.step(world.rng.choice(list(world.workers.values())))
        if step % 23 == seed % 23:
            world.kill(world.rng.choice([w for w in world.workers.values() if Role.ENCODE in w.roles]))
        if step == 5 * seed:
            world.dispatcher.cancel(names[0])
            world.deliver()
    world.run()
    ends = [world.finals()[name].record.state for name in names]
    assert ends[0] in (State.FINISHED, State.CANCELLED)
    assert set(ends[1:]) == {State.FINISHED}
    assert all(world.tokens(name) == WHOLE for name in names[1:])
    for _ in range(200):
        world.step(world.rng.choice(list(world.workers.values())))
    assert not world.dispatcher.lease_owner
    assert all(not worker.holds for worker in world.dispatcher.workers.values())


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
