"""Preempted requests are prefilled again: no token is lost or doubled, nobody is blamed, they go first."""

from __future__ import annotations

import pytest

from mmserve import messages as m
from mmserve.messages import Role
from mmserve.workers.records import State
from tests.workers.world import EPD, PARTS, TOGETHER, WHOLE, FakeWorker, World

LAYOUTS = pytest.mark.parametrize("roles", [EPD, TOGETHER], ids=["epd", "colocated"])


def prompts(worker: FakeWorker, name: str) -> list[m.PrefillPrompt]:
    return [c for c in worker.done if isinstance(c, m.PrefillPrompt) and c.request_id == name]


def encodings(world: World) -> int:
    return sum(isinstance(c, m.EncodeMedia) for c in world.role(Role.ENCODE).done)


@LAYOUTS
@pytest.mark.parametrize("media", [0, 2])
@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_a_preempted_request_goes_on_where_it_was(
    roles: tuple[tuple[Role, ...], ...], media: int, tokens: int
) -> None:
    world = World(*roles)
    name = world.submit(media)
    world.preempt(world.decode_until(name, tokens), name)
    record = world.dispatcher.records[name]
    assert record.attempt == 1
    world.run()
    assert world.tokens(name) == WHOLE
    assert prompts(world.role(Role.PREFILL), name)[1].forced == tuple(WHOLE[:tokens])
    assert encodings(world) == 2 * media, "the second time out of the cache"
    assert world.finals()[name].record.state is State.FINISHED
    counts = world.dispatcher.counts
    assert (counts["preempted"], counts.get("retries", 0), counts.get("poisoned", 0)) == (1, 0, 0)
    assert (record.is_suspect, record.deaths_without_progress) == (False, 0)
    world.settle()
    assert not world.dispatcher.lease_owner
    assert not world.role(Role.DECODE).held


@LAYOUTS
@pytest.mark.parametrize("seed", range(15))
def test_preemptions_and_deaths_at_any_moment_lose_nothing(
    roles: tuple[tuple[Role, ...], ...], seed: int
) -> None:
    world = World(*roles, seed=seed)
    names = [world.submit(number % 3) for number in range(8)]
    preempted = 0
    for step in range(400):
        worker = world.rng.choice(list(world.workers.values()))
        if worker.decodes and world.rng.random() < 0.4:
            world.preempt(worker, world.rng.choice(sorted(worker.decodes)))
            preempted += 1
        elif step % 97 == 96:
            world.kill(worker)
        else:
            world.step(worker)
    world.run(20_000)
    assert preempted > 2
    assert world.dispatcher.counts["preempted"] == preempted
    assert {world.finals()[name].record.state for name in names} == {State.FINISHED}
    assert all(world.tokens(name) == WHOLE for name in names)
    assert not world.dispatcher.waiting
    world.settle()
    assert not world.dispatcher.lease_owner
    assert all(not worker.holds for worker in world.dispatcher.workers.values())


@LAYOUTS
def test_an_event_of_an_old_attempt_changes_nothing(roles: tuple[tuple[Role, ...], ...]) -> None:
    world = World(*roles)
    name = world.submit()
    worker = world.decode_until(name, 2)
    stale = world.preempt(worker, name)
    for _ in range(2):
        world.dispatcher.handle(worker.name, worker.upward(stale))
    assert world.dispatcher.records[name].attempt == 1
    world.decode_until(name, 4)
    world.dispatcher.handle(worker.name, worker.upward(stale))
    world.dispatcher.handle(worker.name, worker.upward(m.RequestPreempted(request_id="none", attempt=0)))
    assert world.dispatcher.counts["preempted"] == 1
    world.run()
    assert world.tokens(name) == WHOLE


def test_an_event_of_a_worker_that_has_handed_off_changes_nothing() -> None:
    world = World(*EPD)
    name = world.submit()
    world.decode_until(name, 2)
    prefill = world.role(Role.PREFILL)
    event = m.RequestPreempted(request_id=name, attempt=0)
    world.dispatcher.handle(prefill.name, prefill.upward(event))
    assert "preempted" not in world.dispatcher.counts
    assert world.dispatcher.records[name].attempt == 0


@LAYOUTS
def test_a_prompt_preempted_in_its_prefill_is_not_encoded_again(
    roles: tuple[tuple[Role, ...], ...],
) -> None:
    world = World(*roles)
    prefill = world.role(Role.PREFILL)
    prefill.rejects_prompts = True
    name = world.submit(1)
    for _ in range(100):
        world.step(world.rng.choice(list(world.workers.values())))
        if len(prompts(prefill, name)) == 3:
            break
    prefill.rejects_prompts = False
    assert world.dispatcher.records[name].attempt == 3
    world.run()
    assert world.tokens(name) == WHOLE
    assert encodings(world) == 1


def test_a_sequence_preempted_before_its_decode_command_arrives_runs_again() -> None:
    world = World(*TOGETHER)
    worker = world.role(Role.PREFILL)
    name = world.submit(0)
    world.step(worker)
    assert len(world.dispatcher.records[name].tokens) == 1
    assert [type(command) for _, command in worker.inbox] == [m.DecodeFrom]
    # a real worker drops the command of a sequence that it has forgotten
    worker.inbox.clear()
    event = m.RequestPreempted(request_id=name, attempt=0)
    world.dispatcher.handle(worker.name, worker.upward(event))
    world.deliver()
    world.run()
    assert world.tokens(name) == WHOLE
    assert prompts(worker, name)[1].forced == (100,)


def test_kv_that_was_handed_off_is_released_when_its_reader_preempts() -> None:
    world = World(*EPD)
    name = world.submit(0)
    decode, prefill = world.role(Role.DECODE), world.role(Role.PREFILL)
    while not decode.inbox:
        world.step(prefill)
    world.step(decode)
    lease = world.dispatcher.records[name].kv_lease
    assert lease is not None
    world.preempt(decode, name)
    world.settle()
    assert lease.lease_id in prefill.released


@LAYOUTS
def test_a_preempted_request_goes_before_all_that_wait(roles: tuple[tuple[Role, ...], ...]) -> None:
    world = World(*roles, slots=100)
    first = world.submit(0, text=80)
    worker = world.decode_until(first, 2)
    later = [world.submit(0, text=80) for _ in range(3)]
    urgent = world.submit(0, text=80, priority=-1)
    world.preempt(worker, first)
    world.run()
    order = [c.request_id for c in world.role(Role.PREFILL).done if isinstance(c, m.PrefillPrompt)]
    # in E|P|D one was already sent to the prefill worker; a higher priority goes first all the same
    sent, kept = ([], later) if roles is TOGETHER else (later[:1], later[1:])
    assert order == [first, *sent, urgent, first, *kept]
    assert all(world.tokens(name) == WHOLE for name in (first, urgent, *later))


def test_who_encodes_and_prefills_is_told_to_stop_both() -> None:
    world = World(*TOGETHER)
    worker = world.role(Role.PREFILL)
    name = world.submit(1)
    while name not in worker.prompts:
        world.step(worker)
    world.preempt(worker, name)
    assert isinstance(worker.inbox[0][1], m.CancelRequest)
    world.run()
    assert world.tokens(name) == WHOLE
    assert not worker.encodes
    world.settle()
    assert not world.dispatcher.lease_owner


def test_a_prompt_preempted_before_it_is_whole_begins_anew() -> None:
    world = World(*EPD)
    encode, prefill = world.role(Role.ENCODE), world.role(Role.PREFILL)
    name = world.submit(2)
    while name not in prefill.prompts:
        world.step(world.rng.choice([encode, prefill]))
    world.preempt(prefill, name)
    world.run()
    assert world.tokens(name) == WHOLE
    assert encodings(world) == 4
    assert not any(command.attempt for command, _ in encode.encodes)
    world.settle()
    assert not world.dispatcher.lease_owner


def test_what_is_reported_is_the_first_prefill() -> None:
    """The second one finds embeddings and KV that the first one left in the caches."""
    world = World(*TOGETHER)
    worker = world.role(Role.DECODE)
    name = world.submit(1)
    world.decode_until(name, 3)
    record = world.dispatcher.records[name]
    first, items = record.prefilled, record.items
    waited = record.waited_ms
    world.preempt(worker, name)
    world.clock.now += 5.0
    world.dispatcher.cancel(name)
    world.deliver()
    final = world.finals()[name].record
    assert final.prefilled is first
    assert final.items is items
    assert final.waited_ms == waited
    assert final.usage().visual_tokens == 12 * len(PARTS)
    assert not world.dispatcher.waiting
    assert not world.dispatcher.lease_owner
