"""frames.py: leases read over tcp are the arrays that were published, or unreadable (R3, R5, R34)."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mmserve import frames
from mmserve.errors import WireError
from mmserve.frames import ANSWERS, PIECE_BYTES, FrameReader, FrameServer, NoPiece, Piece, ReadPiece
from mmserve.lease import Lease
from mmserve.queues import CurveKeys, Dealer, Router, make_keys
from mmserve.transfer import LeaseStore, LeaseUnreadable, MappedLeases
from mmserve.wire import Array, TypedArray

KEYS = make_keys()
ARRAYS: dict[str, Array | TypedArray] = {
    "embeddings": np.arange(12, dtype=np.float32).reshape(3, 4),
    "k": TypedArray(np.array([0x3F80, 0x4000], np.uint16), "bfloat16"),
    "none": np.zeros((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
    "large": np.random.default_rng(0).integers(0, 256, 20 * PIECE_BYTES + 1, dtype=np.uint8),
}


@dataclass
class Owner:
    """One process's end: a store, and the thread that answers for it."""

    directory: Path
    keys: CurveKeys = KEYS

    def __post_init__(self) -> None:
        router = Router("tcp://127.0.0.1:0", self.keys)
        self.store = LeaseStore([self.directory], endpoint=router.endpoint)
        self.server = FrameServer(self.store, router)

    def close(self) -> None:
        self.server.close()
        self.store.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    made = Owner(tmp_path)
    yield made
    made.close()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[FrameReader]:
    monkeypatch.setattr(frames, "CONNECT_S", 1.0)
    with FrameReader(KEYS) as made:
        yield made


def test_arrays_over_tcp_equal_those_of_shared_memory(
    owner: Owner, reader: FrameReader, tmp_path: Path
) -> None:
    lease = owner.store.publish(ARRAYS, with_crc=True)
    wired = msgspec.msgpack.decode(msgspec.msgpack.encode(lease), type=Lease)
    over_tcp, mapped = reader.open(wired), MappedLeases([tmp_path]).open(wired)
    assert list(over_tcp) == list(mapped) == list(ARRAYS)
    for name, array in mapped.items():
        np.testing.assert_array_equal(over_tcp[name], array)
        assert over_tcp[name].dtype == array.dtype
        assert not over_tcp[name].flags.writeable


def test_some_arrays_are_read_alone(owner: Owner, reader: FrameReader) -> None:
    lease = owner.store.publish(ARRAYS, with_crc=True)
    found = reader.open(lease, ("scalar", "embeddings"))
    assert set(found) == {"scalar", "embeddings"}
    assert found["scalar"] == 7


def test_a_lease_that_is_gone_is_said_at_once_and_the_next_is_read(owner: Owner, reader: FrameReader) -> None:
    gone, there = owner.store.publish(ARRAYS), owner.store.publish(ARRAYS)
    owner.store.release(gone.lease_id)
    with pytest.raises(LeaseUnreadable) as caught:
        reader.open(gone)
    assert caught.value.lease_id == gone.lease_id
    assert reader.open(there)["scalar"] == 7
    Path(there.path).unlink()
    with pytest.raises(LeaseUnreadable):
        reader.open(there)


def test_a_dead_owner_costs_little_time(owner: Owner, reader: FrameReader) -> None:
    first, second = owner.store.publish(ARRAYS), owner.store.publish(ARRAYS)
    reader.open(first)
    owner.server.close()
    for _ in range(2):  # who was known, and who cannot be reached
        started_at = time.monotonic()
        with pytest.raises(LeaseUnreadable):
            reader.open(second)
        assert time.monotonic() - started_at < 5


def test_links_to_dead_owners_do_not_add_up(owner: Owner, reader: FrameReader, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        before = Owner(tmp_path / str(number))
        reader.open(before.store.publish(ARRAYS))
        link = reader._links[before.store._endpoint]
        before.close()
        until = time.monotonic() + 10
        while link.is_connected and time.monotonic() < until:
            link.poll(0.01)
    reader.open(owner.store.publish(ARRAYS))
    assert len(reader._links) == 1


def test_a_changed_byte_of_the_file_is_found(owner: Owner, reader: FrameReader) -> None:
    lease = owner.store.publish({"x": np.zeros(100, np.uint8)}, with_crc=True)
    with Path(lease.path).open("r+b") as file:
        file.seek(lease.arrays[0].offset)
        file.write(b"\x01")
    with pytest.raises(LeaseUnreadable):
        reader.open(lease)


def piece(question: ReadPiece, data: bytes, **change: int | str) -> Piece:
    honest = Piece(question.lease_id, question.offset, zlib.crc32(data), memoryview(data))
    return msgspec.structs.replace(honest, **change)


@pytest.mark.parametrize(
    "answer",
    [
        lambda q: piece(q, bytes(q.num_bytes), crc=1),
        lambda q: piece(q, bytes(q.num_bytes - 1)),
        lambda q: piece(q, bytes(q.num_bytes), offset=q.offset + 64),
        lambda q: piece(q, bytes(q.num_bytes), offset=-1),
        lambda q: piece(q, bytes(q.num_bytes), lease_id="f" * 32),
        lambda q: NoPiece(q.lease_id),
    ],
    ids=["checksum", "short", "elsewhere", "negative", "another", "gone"],
)
def test_a_piece_that_is_not_what_was_asked_for_is_refused(
    owner: Owner,
    reader: FrameReader,
    answer: Callable[[ReadPiece], Piece | NoPiece],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lease = owner.store.publish({"x": np.zeros(256, np.uint8)})
    monkeypatch.setattr(owner.server, "_answer", answer)
    with pytest.raises(LeaseUnreadable):
        reader.open(lease)
    monkeypatch.undo()
    assert reader.open(lease)["x"].sum() == 0


@pytest.mark.parametrize(
    "change",
    [
        {"checksum": 1},
        {"total_bytes": 1 << 40},
        {"endpoint": ""},
        {"endpoint": "tcp://0.0.0.0:5"},
        {"endpoint": "tcp://127.0.0.1:*"},
        {"arrays": ()},
    ],
)
def test_a_lease_that_lies_is_unreadable_before_anything_is_asked(
    owner: Owner, reader: FrameReader, change: dict[str, object]
) -> None:
    lease = owner.store.publish(ARRAYS)
    with pytest.raises(LeaseUnreadable):
        reader.open(msgspec.structs.replace(lease, **change))


def ask(dealer: Dealer, frame: bytes) -> list[bytes]:
    dealer.send(frame)
    got: list[bytes] = []
    until = time.monotonic() + 10
    while not got and time.monotonic() < until:
        got = dealer.poll(0.1)
    return got


def test_questions_outside_a_lease_get_no_bytes_and_noise_no_answer(owner: Owner) -> None:
    lease = owner.store.publish({"x": np.zeros(4096, np.uint8)})
    with Dealer(lease.endpoint, b"r", KEYS) as dealer:
        for noise in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\xff" * 100):
            dealer.send(noise)
        size = lease.total_bytes
        for offset, count in (
            (-1, 5),
            (0, 0),
            (0, -1),
            (size, 1),
            (64, size),
            (0, PIECE_BYTES + 1),
            (2**63 - 1, 9),
        ):
            (frame,) = ask(dealer, frames.QUESTIONS.encode(ReadPiece(lease.lease_id, offset, count)))
            assert ANSWERS.decode(frame) == NoPiece(lease.lease_id)
        for name in ("f" * 32, "../" + "f" * 29, "", "\0"):
            (frame,) = ask(dealer, frames.QUESTIONS.encode(ReadPiece(name, 0, 9)))
            assert ANSWERS.decode(frame) == NoPiece(name)
    assert owner.server.dropped == 4


def test_a_reader_with_other_keys_gets_nothing(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "CONNECT_S", 0.5)
    lease = owner.store.publish(ARRAYS)
    with FrameReader(make_keys()) as stranger, pytest.raises(LeaseUnreadable):
        stranger.open(lease)


def test_mutated_frames_are_refused_in_both_directions(owner: Owner) -> None:
    lease = owner.store.publish({"x": np.zeros(256, np.uint8)})
    question = frames.QUESTIONS.encode(ReadPiece(lease.lease_id, 64, 256))
    answer = ANSWERS.encode(piece(ReadPiece(lease.lease_id, 64, 256), bytes(256)))
    chance = random.Random(5)
    outcomes = {"refused": 0, "taken": 0}
    for number in range(20_000):
        frame = bytearray(question if number % 2 else answer)
        for _ in range(chance.randint(1, 3)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        try:
            if number % 2:
                owner.server._answer(frames.QUESTIONS.decode(frame))
            else:
                target = bytearray(b"\xff" * 256)
                frames._take(ANSWERS.decode(frame), lease, {64: memoryview(target)})
                assert target == bytes(256), "a changed byte got in"
            outcomes["taken"] += 1
        except WireError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0
