"""WorkerLoop: bad frames and other epochs change nothing, heartbeats, announcements, tidying."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve import messages as m
from mmserve.errors import MediaError
from mmserve.queues import Dealer
from mmserve.transfer import LeaseUnreadable
from mmserve.workers import loop
from mmserve.workers.loop import COMMANDS, EVENTS, Handler, WorkerLoop, failed


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeDealer:
    """Gives the loop one batch of frames per poll; an idle poll takes its time."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.batches: list[list[bytes]] = []
        self.sent: list[m.Upward] = []
        self.sent_at: list[float] = []

    def poll(self, timeout_s: float) -> list[bytes]:
        batch = self.batches.pop(0) if self.batches else []
        self.clock.now += 0.0 if batch else timeout_s
        return batch

    def send(self, frame: bytes) -> bool:
        self.sent.append(EVENTS.decode(frame))
        self.sent_at.append(self.clock.now)
        return True

    def events(self) -> list[m.AnyEvent]:
        return [upward.event for upward in self.sent]


class FakeHandler:
    def __init__(self, role: m.Role, requests: int, slots: int = 0) -> None:
        self.roles = (role,)
        self.capacity = m.Credits(requests=requests, slots=slots)
        self.got: list[m.AnyCommand] = []
        self.work: list[Callable[[], None]] = []

    def credits(self) -> m.Credits:
        return m.Credits(requests=self.capacity.requests - len(self.got), slots=self.capacity.slots)

    def handle(self, command: m.AnyCommand) -> None:
        self.got.append(command)

    def step(self) -> bool:
        if self.work:
            self.work.pop(0)()
        return bool(self.work)


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *handlers: FakeHandler) -> None:
        self.clock = FakeClock()
        monkeypatch.setattr(loop, "time", self.clock)
        self.dealer = FakeDealer(self.clock)
        self.loop = WorkerLoop(cast("Dealer", self.dealer), "revision", 42)
        self.handlers = handlers or (FakeHandler(m.Role.DECODE, 4, 100),)
        self.tidied: list[float] = []

    def run(self, turns: int) -> None:
        left = iter(range(turns))
        self.loop.run(
            cast("tuple[Handler, ...]", self.handlers),
            lambda: next(left, None) is None,
            lambda: self.tidied.append(self.clock.now),
        )


def frame(number: int, epoch: str = "now", command: m.AnyCommand | None = None) -> bytes:
    command = command or m.CancelRequest(request_id=f"r{number}")
    return COMMANDS.encode(m.Downward(epoch=epoch, number=number, command=command))


def test_it_reports_itself_ready_first_with_all_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, FakeHandler(m.Role.ENCODE, 32), FakeHandler(m.Role.DECODE, 4, 100))
    world.run(0)
    (upward,) = world.dealer.sent
    # the scarcer places, the language model's slots
    assert upward.event == m.WorkerReady(
        roles=(m.Role.ENCODE, m.Role.DECODE),
        pid=42,
        weights_revision="revision",
        capacity=m.Credits(requests=4, slots=100),
    )
    assert upward.credits == m.Credits(requests=4, slots=100)


def test_malformed_frames_are_dropped_and_the_rest_is_handled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(monkeypatch)
    extra = b"\x85" + frame(1)[1:]
    world.dealer.batches = [[b"", b"\xc1", b"\xff" * 50, frame(1)[:-1], extra, frame(1)], [frame(2)]]
    with caplog.at_level(logging.WARNING):
        world.run(3)
    assert [cast("m.CancelRequest", got).request_id for got in world.handlers[0].got] == ["r1", "r2"]
    assert len(caplog.records) == 5


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 255))
def test_no_bytes_end_the_loop(noise: bytes, place: int, value: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(monkeypatch)
        bent = bytearray(frame(1))
        bent[place % len(bent)] = value
        # the epoch of what is bent may have become the first one heard, so the good frame goes first
        world.dealer.batches = [[frame(1), noise, bytes(bent), frame(2)]]
        logging.disable()
        world.run(1)
        logging.disable(logging.NOTSET)
        names = [getattr(got, "request_id", "") for got in world.handlers[0].got]
        assert names[0] == "r1"
        assert names[-1] == "r2"


def test_commands_of_another_epoch_are_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(monkeypatch)
    world.dealer.batches = [[frame(1), frame(9, "before"), frame(2)]]
    world.handlers[0].work = [lambda: world.loop.emit(m.Heartbeat())]
    with caplog.at_level(logging.WARNING):
        world.run(1)
    assert len(world.handlers[0].got) == 2
    assert len(caplog.records) == 1
    last = world.dealer.sent[-1]
    assert (last.epoch, last.seen) == ("now", 2)
    # credits are those after everything that was seen
    assert last.credits.requests == 2


def test_an_idle_worker_sends_heartbeats_about_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.run(50)  # 10 s of idle polls
    beats = [
        at
        for event, at in zip(world.dealer.events(), world.dealer.sent_at, strict=True)
        if isinstance(event, m.Heartbeat)
    ]
    assert len(beats) >= 7
    gaps = [
        after - before for before, after in zip(world.dealer.sent_at, world.dealer.sent_at[1:], strict=False)
    ]
    assert max(gaps) <= loop.HEARTBEAT_S + 2 * loop.IDLE_POLL_S
    assert len(world.tidied) >= 7


def test_any_message_is_a_sign_of_life_and_a_busy_worker_tidies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    def step() -> None:
        world.clock.now += 0.4
        world.loop.emit(m.TokensDecoded(tokens=()))

    world.handlers[0].work = [step] * 20
    world.run(19)
    assert not [event for event in world.dealer.events() if isinstance(event, m.Heartbeat)]
    assert len(world.tidied) >= 5


def test_who_is_in_a_step_is_announced_when_it_changes_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    steps = [("a",), ("a",), ("a", "b"), ("b",)]
    world.handlers[0].work = [lambda who=who: world.loop.announce(who, 5.0) for who in steps]  # type: ignore[misc]
    world.run(6)
    said = [event for event in world.dealer.events() if isinstance(event, m.StepStarted)]
    assert [event.requests for event in said] == [("a",), ("a", "b"), ("b",), ()]
    assert [event.bound_s for event in said] == [5.0, 5.0, 5.0, 0.0]


def test_colocated_handlers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeHandler(m.Role.ENCODE, 4), FakeHandler(m.Role.DECODE, 4)
    world = World(monkeypatch, first, second)
    order: list[str] = []
    first.work = [lambda: order.append("first")] * 3
    second.work = [lambda: order.append("second")] * 3
    world.dealer.batches = [[frame(1)]]
    world.run(3)
    assert order == ["first", "second"] * 3
    assert first.got == second.got != []


def test_failures_tell_clients_our_own_words_only(caplog: pytest.LogCaptureFixture) -> None:
    known = failed("r", 2, MediaError("Expected a picture, but got a song"), "encoding")
    assert isinstance(known, m.RequestFailed)
    assert (known.attempt, known.code) == (2, "media_error")
    assert known.public_message == "Expected a picture, but got a song"
    assert not caplog.records
    unknown = failed("r", 0, RuntimeError("/secret/path at 0x7fff0000"), "encoding its media")
    assert isinstance(unknown, m.RequestFailed)
    assert unknown.code == "internal_error"
    assert unknown.public_message == "The server could not finish this request: encoding its media failed"
    assert len(caplog.records) == 1


def test_what_cannot_be_read_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    lost = failed("r", 2, LeaseUnreadable("f" * 32), "reading its media")
    assert lost == m.LeaseLost(request_id="r", attempt=2, lease_id="f" * 32)
    assert not caplog.records
