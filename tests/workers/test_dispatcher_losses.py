"""What was published and cannot be read any more is made again; no request fails of it (R34)."""

from __future__ import annotations

import pytest

from mmserve import messages as m
from mmserve.errors import Unavailable
from mmserve.messages import Role
from mmserve.workers.records import MAX_LOSSES, State
from tests.workers.world import EEPD, EPD, WHOLE, FakeWorker, World


def encoded(world: World) -> int:
    """Items that the encode worker was sent."""
    return sum(isinstance(command, m.EncodeMedia) for command in world.role(Role.ENCODE).done)


def settled(world: World) -> bool:
    world.settle()
    return not world.dispatcher.lease_owner and not world.dispatcher.waiting


@pytest.mark.parametrize("reader", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("seed", range(10))
def test_a_lost_lease_is_made_again_and_the_answer_is_the_same(reader: Role, seed: int) -> None:
    world = World(*EPD, seed=seed)
    world.role(reader).losses = 1 + seed % 3
    names = [world.submit(2) for _ in range(4)]
    world.run(20_000)
    assert {world.finals()[name].record.state for name in names} == {State.FINISHED}
    assert all(world.tokens(name) == WHOLE for name in names)
    counts = world.dispatcher.counts
    assert counts["lost_leases"] == 1 + seed % 3
    assert counts["re_encoded"] >= counts["lost_leases"]
    assert settled(world)


def test_only_the_lost_item_of_a_whole_prompt_is_encoded_again() -> None:
    world = World(*EPD)
    hold(world, Role.PREFILL)
    name = world.submit(3)
    while not world.dispatcher.records[name].is_encoded:
        world.step(world.role(Role.ENCODE))
    record = world.dispatcher.records[name]
    assert (record.state, record.worker, encoded(world)) == (State.PREFILLING, None, 3)
    lost = record.items[1].parts[0].lease.lease_id
    evict(world, world.role(Role.ENCODE), lost)
    assert [item.is_whole for item in record.items] == [True, False, True]
    hear(world, Role.PREFILL)
    world.run()
    assert world.tokens(name) == WHOLE
    assert encoded(world) == 4
    assert world.dispatcher.counts["re_encoded"] == 1
    assert settled(world)


def test_a_lease_that_is_always_lost_fails_its_request_at_last() -> None:
    world = World(*EPD)
    world.role(Role.PREFILL).losses = 10**6
    bad = world.submit(1)
    good = world.submit(0)
    world.run()
    error = world.finals()[bad].record.error
    assert isinstance(error, Unavailable)
    assert error.retryable
    assert world.dispatcher.counts["lost_leases"] == MAX_LOSSES + 1
    assert encoded(world) == MAX_LOSSES + 1
    assert world.tokens(good) == WHOLE
    assert settled(world)


def hold(world: World, role: Role) -> None:
    """Nothing more is sent to a stage until it is heard again."""
    world.dispatcher.workers[world.role(role).name].credits = m.Credits(requests=0)


def hear(world: World, role: Role) -> None:
    worker = world.role(role)
    world.dispatcher.handle(worker.name, worker.upward(m.Heartbeat()))
    world.deliver()


def evict(world: World, worker: FakeWorker, *lease_ids: str) -> None:
    world.dispatcher.handle(worker.name, worker.upward(m.LeasesEvicted(lease_ids=lease_ids)))
    world.deliver()


def test_an_eviction_is_told_before_anybody_reads() -> None:
    world = World(*EPD)
    hold(world, Role.DECODE)
    name = world.submit(1)
    record = world.dispatcher.records[name]
    while record.kv_lease is None:
        world.step(world.rng.choice([world.role(Role.ENCODE), world.role(Role.PREFILL)]))
    evict(world, world.role(Role.PREFILL), "f" * 32, record.kv_lease.lease_id)
    assert record.state is State.ENCODING
    assert record.attempt == 1
    hear(world, Role.DECODE)
    world.run()
    assert world.tokens(name) == WHOLE
    assert world.dispatcher.counts["lost_leases"] == 1


def test_what_a_worker_reads_now_is_not_made_again_behind_its_back() -> None:
    world = World(*EPD)
    encode, prefill = world.role(Role.ENCODE), world.role(Role.PREFILL)
    name = world.submit(1)
    while not prefill.inbox:
        world.step(encode)
    record = world.dispatcher.records[name]
    evict(world, encode, record.items[0].parts[0].lease.lease_id)
    assert record.attempt == 0
    world.run()
    assert world.tokens(name) == WHOLE
    assert "re_encoded" not in world.dispatcher.counts


@pytest.mark.parametrize("endpoint", ["", "tcp://127.0.0.1:5"])
@pytest.mark.parametrize("victim", [Role.ENCODE, Role.PREFILL])
def test_what_a_dead_owner_served_is_made_again_and_what_lies_in_files_is_not(
    victim: Role, endpoint: str
) -> None:
    world = World(*EPD)
    for worker in world.workers.values():
        worker.endpoint = endpoint
    readers = {Role.ENCODE: Role.PREFILL, Role.PREFILL: Role.DECODE}
    hold(world, readers[victim])
    name = world.submit(1)
    record = world.dispatcher.records[name]
    while not (record.is_encoded if victim is Role.ENCODE else record.kv_lease):
        world.step(world.rng.choice(list(world.workers.values())))
    world.kill(world.role(victim))
    assert (world.dispatcher.counts.get("lost_leases", 0) == 1) == bool(endpoint)
    hear(world, readers[victim])
    world.run()
    assert world.tokens(name) == WHOLE


@pytest.mark.parametrize("by_death", [True, False])
def test_what_is_lost_together_is_one_loss(by_death: bool) -> None:
    """More items than losses are forgiven, all of a prompt that a worker was about to read."""
    world = World(*EPD)
    encode, prefill = world.role(Role.ENCODE), world.role(Role.PREFILL)
    encode.endpoint = "tcp://127.0.0.1:5" if by_death else ""
    name = world.submit(MAX_LOSSES + 2)
    record = world.dispatcher.records[name]
    while not record.is_encoded:
        world.step(encode)
    assert record.worker == prefill.name
    prefill.unreadable = {lease.lease_id for lease in record.leases}
    if by_death:
        world.kill(encode)
    else:
        evict(world, encode, *prefill.unreadable)
    world.run()
    assert world.tokens(name) == WHOLE
    assert world.dispatcher.counts["lost_leases"] == 1
    assert world.dispatcher.counts["re_encoded"] == MAX_LOSSES + 2
    assert settled(world)


def test_who_runs_a_prompt_is_told_when_it_begins_anew_elsewhere() -> None:
    """A helper that was not needed dies: its request runs alone from now on, and in one place."""
    world = World(*EEPD)
    name = world.submit(1)
    record = world.dispatcher.records[name]
    owner = next(worker for worker in world.workers.values() if worker.inbox)
    world.step(owner)
    (helper,) = [worker for worker in world.workers.values() if worker is not owner and worker.inbox]
    owner.inbox.clear()  # it is faster than word of its helper
    while not record.is_encoded:
        world.step(owner)
    prefill = world.role(Role.PREFILL)
    assert (record.state, record.worker) == (State.PREFILLING, prefill.name)
    world.kill(helper, step=(name,))
    assert (record.is_suspect, record.attempt) == (True, 1)
    commands = [command for _, command in prefill.inbox]
    assert m.CancelRequest(request_id=name) in commands
    world.run()
    assert world.tokens(name) == WHOLE
    assert settled(world)


def test_an_old_attempts_loss_changes_nothing() -> None:
    world = World(*EPD)
    prefill = world.role(Role.PREFILL)
    prefill.losses = 1
    name = world.submit(1)
    world.run()
    late = m.LeaseLost(request_id=name, attempt=0, lease_id="0" * 32)
    other = world.submit(1)
    world.dispatcher.handle(prefill.name, prefill.upward(late))
    stranger = m.LeaseLost(request_id=other, attempt=0, lease_id="0" * 32)
    world.dispatcher.handle(prefill.name, prefill.upward(stranger))
    assert world.dispatcher.records[other].attempt == 0
    world.run()
    assert world.tokens(other) == WHOLE
