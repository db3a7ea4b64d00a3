"""Who goes first: priorities, arrival, nobody overtaken for lack of credit; what never fits is refused."""

from __future__ import annotations

from typing import TypeVar

import pytest

from mmserve import messages as m
from mmserve.messages import DECODE_HEADROOM, Role
from mmserve.workers.records import State
from tests.workers.world import EPD, TOGETHER, FakeWorker, World

W = TypeVar("W", m.EncodeMedia, m.PrefillPrompt, m.DecodeFrom)


def waiting(worker: FakeWorker, kind: type[W]) -> list[str]:
    """Requests whose commands a worker has not read yet."""
    return [command.request_id for _, command in worker.inbox if isinstance(command, kind)]


def begun(worker: FakeWorker) -> list[str]:
    return [command.request_id for command in worker.done if isinstance(command, m.PrefillPrompt)]


def test_jobs_are_taken_by_priority_then_arrival() -> None:
    world = World(*TOGETHER, slots=100)
    running = world.submit(0, text=90)
    worker = world.role(Role.PREFILL)
    late, low, high, later = (world.submit(0, text=90, priority=p) for p in (0, 1, -1, 0))
    world.run()
    assert begun(worker) == [running, high, late, later, low]


def test_arrival_is_admission_whatever_takes_longer() -> None:
    world = World((Role.PREFILL, Role.DECODE), slots=100)
    running = world.submit(0, text=90)
    with_media = world.submit(1, text=80)
    without = world.submit(0, text=90)
    assert waiting(world.role(Role.PREFILL), m.PrefillPrompt) == [running]
    world.start((Role.ENCODE,))
    world.deliver()
    world.step(world.role(Role.ENCODE))
    world.run()
    assert begun(world.role(Role.PREFILL)) == [running, with_media, without]


@pytest.mark.parametrize("roles", [EPD, TOGETHER], ids=["epd", "colocated"])
def test_a_large_prompt_is_not_starved_by_small_ones(roles: tuple[tuple[Role, ...], ...]) -> None:
    world = World(*roles, slots=200)
    small = [world.submit(0, text=40) for _ in range(6)]
    large = world.submit(0, text=180)
    for _ in range(400):
        # there is always another small one
        if len(world.dispatcher.records) < 8:
            small.append(world.submit(0, text=40))
        world.step(world.rng.choice(list(world.workers.values())))
    finals = world.finals()
    assert finals[large].record.state is State.FINISHED
    assert len(finals) > 20
    world.run()


def test_a_job_without_credit_holds_back_only_its_role() -> None:
    world = World(*EPD, slots=100)
    prefill, decode = world.role(Role.PREFILL), world.role(Role.DECODE)
    first = world.submit(0, text=60)
    world.step(prefill)
    second = world.submit(0, text=60)
    world.step(prefill)
    third = world.submit(0, text=10)
    world.step(prefill)
    # the decode worker has no room for the second, and the third waits behind it
    assert waiting(decode, m.DecodeFrom) == [first]
    assert [job.request_id for job in world.dispatcher.waiting] == [second, third]
    # meanwhile prompts are prefilled and media encoded
    fourth, fifth = world.submit(0), world.submit(1)
    assert waiting(prefill, m.PrefillPrompt) == [fourth]
    assert waiting(world.role(Role.ENCODE), m.EncodeMedia) == [fifth]
    world.run()


def test_items_wait_only_for_their_own_encoder() -> None:
    world = World(*EPD)
    world.start((Role.ENCODE,), slot=1)
    encoders = [worker for worker in world.workers.values() if Role.ENCODE in worker.roles]
    # one item over and over: its encoder has 8 places
    names = [world.submit(1) for _ in range(12)]
    (busy,) = (worker for worker in encoders if worker.inbox)
    (idle,) = (worker for worker in encoders if worker is not busy)
    assert waiting(busy, m.EncodeMedia) == names[:8]
    several = world.submit(6)
    assert several in waiting(idle, m.EncodeMedia)
    assert waiting(busy, m.EncodeMedia) == names[:8]
    world.run()


def test_a_suspect_that_waits_for_an_empty_worker_holds_back_nobody() -> None:
    world = World(*TOGETHER, *TOGETHER)
    names = [world.submit(0, max_tokens=50) for _ in range(4)]
    for name in names:
        world.decode_until(name, 2)
    victim = world.decode_until(names[0], 2)
    (other,) = (w for w in world.workers.values() if w is not victim)
    before = set(world.dispatcher.workers[other.name].holds)
    world.kill(victim, step=(names[0],))
    suspect = world.dispatcher.records[names[0]]
    assert suspect.is_suspect
    late = world.submit(0)
    holders = [w for w in world.dispatcher.workers.values() if late in w.holds]
    assert len(holders) == 1
    assert holders[0].reserved_for is None
    assert before <= set(world.dispatcher.workers[other.name].holds)
    world.run()


def test_a_long_answer_asks_for_little_room_at_first() -> None:
    world = World(*TOGETHER, slots=700)
    slots = 5 + DECODE_HEADROOM
    for _ in range(8):
        world.submit(0, max_tokens=600)
    worker = world.role(Role.PREFILL)
    assert len(waiting(worker, m.PrefillPrompt)) == 8
    assert sum(cost for _, cost in world.dispatcher.workers[worker.name].unseen) == 8 * slots
    world.settle()
    assert sum(worker.held.values()) == 8 * slots


def test_room_for_a_resumed_answer_counts_the_tokens_it_has() -> None:
    world = World(*TOGETHER, slots=700)
    name = world.submit(0, max_tokens=600)
    worker = world.decode_until(name, 100)
    world.preempt(worker, name)
    assert [cost for _, cost in world.dispatcher.workers[worker.name].unseen] == [5 + 100 + DECODE_HEADROOM]
    world.step(worker)
    world.decode_until(name, 570)
    world.preempt(worker, name)
    assert [cost for _, cost in world.dispatcher.workers[worker.name].unseen] == [5 + 600]


@pytest.mark.parametrize(("text", "max_tokens"), [(101, 5), (50, 51), (96, 5)])
def test_what_can_never_fit_is_refused(text: int, max_tokens: int) -> None:
    world = World(*TOGETHER, slots=100)
    running = world.submit(0, text=60)
    name = world.submit(0, text=text, max_tokens=max_tokens)
    error = world.finals()[name].record.error
    assert error is not None
    assert error.code == "bad_request"
    assert error.public_message == (
        f"Expected a prompt of at most 100 tokens with its answer, but got {text + max_tokens}"
    )
    world.run()
    assert world.finals()[running].record.state is State.FINISHED


def test_what_no_decode_worker_can_hold_is_refused_instead_of_blocking_others() -> None:
    world = World(*EPD[:2], slots=1000)
    large = world.submit(0, text=150)
    world.step(world.role(Role.PREFILL))
    small = world.submit(0)
    world.capacity = m.Credits(requests=8, slots=100)
    world.start(EPD[2])
    world.deliver()
    world.run()
    finals = world.finals()
    assert finals[large].record.state is State.FAILED
    assert finals[small].record.state is State.FINISHED
    world.settle()
    assert not world.dispatcher.lease_owner
