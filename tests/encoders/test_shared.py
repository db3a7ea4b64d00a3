"""The shared tier: a real server that comes and goes, and servers that behave in every wrong way."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers import base
from mmserve.encoders.tiers.base import Stored, TierError
from mmserve.encoders.tiers.lane import Lane
from mmserve.encoders.tiers.shared import SharedTier
from mmserve.errors import ConfigError
from tests.encoders.entries import ROWS, entry, key, same
from tests.encoders.servers import Server, real_server

WAIT_S = 10.0
TIMEOUT_S = 0.2


@pytest.fixture
def server() -> Iterator[Server]:
    with real_server() as server:
        yield server


def tier_at(url: str, timeout_s: float = TIMEOUT_S) -> SharedTier:
    return SharedTier(url, timeout_s=timeout_s, expire_s=1000)


def cache_at(url: str, capacity: int = 0) -> EmbeddingCache:
    return EmbeddingCache(capacity, tiers=[tier_at(url, WAIT_S)], rows=ROWS)


def test_what_one_instance_stores_another_one_finds(server: Server) -> None:
    with closing(cache_at(server.url)) as first, closing(cache_at(server.url)) as second:
        for number in range(40):
            first.put(key(number), entry(50, number / 8), tenant="t")
        assert first.flush(WAIT_S)
        found = second.get_many([key(number) for number in range(50)], tokens=50)
        assert found.keys() == {key(number) for number in range(40)}
        assert all(same(found[key(number)], entry(50, number / 8)) for number in range(40))


def test_it_survives_a_restart_of_the_instance(server: Server) -> None:
    with closing(cache_at(server.url)) as cache:
        cache.put(key(1), entry(5, 0.5))
    with closing(cache_at(server.url)) as cache:
        assert same(cache.get(key(1)), entry(5, 0.5))


def test_records_expire(server: Server) -> None:
    with closing(cache_at(server.url)) as cache, closing(server.client()) as client:
        cache.put(key(1), entry(5))
        assert cache.flush(WAIT_S)
        (name,) = client.keys("*")
        assert 0 < client.ttl(name) <= 1000


def test_a_broken_record_goes(server: Server) -> None:
    with closing(cache_at(server.url)) as cache, closing(server.client()) as client:
        cache.put(key(1), entry(5))
        assert cache.flush(WAIT_S)
        (name,) = client.keys("*")
        client.setrange(name, 50, b"x")
        assert cache.get(key(1)) is None
        assert cache.flush(WAIT_S)
        assert client.keys("*") == []


def test_a_server_that_goes_and_comes_back_is_found_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(base, "LONGEST_PAUSE_S", 0.001)
    with closing(cache_at(server.url)) as cache:
        cache.put(key(1), entry(5))
        assert cache.flush(WAIT_S)
        server.stop()
        for _ in range(3):
            assert cache.get(key(1)) is None
            cache.put(key(2), entry(5))
            assert cache.flush(WAIT_S)
        assert cache.stats().tiers[0].dropped >= 1
        server.start()
        deadline = time.monotonic() + WAIT_S
        while cache.get(key(3)) is None:
            assert time.monotonic() < deadline
            cache.put(key(3), entry(5))
            assert cache.flush(WAIT_S)
    messages = [record.getMessage().split(":")[0] for record in caplog.records]
    assert sorted(messages) == [
        "reading the embedding cache's redis tier is left alone until it works again",
        "reading the embedding cache's redis tier works again",
        "writing to the embedding cache's redis tier is left alone until it works again",
        "writing to the embedding cache's redis tier works again",
    ]


def test_a_full_server_still_answers_reads(server: Server) -> None:
    with closing(cache_at(server.url)) as cache, closing(server.client()) as client:
        cache.put(key(1), entry(5))
        assert cache.flush(WAIT_S)
        client.config_set("maxmemory", "1")
        cache.put(key(2), entry(5))
        assert cache.flush(WAIT_S)
        stats = cache.stats().tiers[0]
        assert (stats.stored, stats.dropped) == (1, 1)
        assert cache.get(key(1)) is not None


def test_a_server_that_asks_for_a_password(server: Server) -> None:
    with closing(server.client()) as client:
        client.config_set("requirepass", "right")
    for password, works in (("right", True), ("wrong", False)):
        with closing(cache_at(f"{server.url}?password={password}")) as cache:
            cache.put(key(1), entry(5))
            assert cache.flush(WAIT_S)
            assert (cache.get(key(1)) is not None) is works


Behaviour = Callable[[socket.socket], None]


class BadServer:
    """Does the same to each who connects."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # also one that was accepted while `close` ran
        with suppress(OSError), connection:
            self._behave(connection)

    def close(self) -> None:
        # closing alone would not wake who waits for it
        for connection in (self._listening, *self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _answer(*replies: bytes) -> Behaviour:
    """`replies` in turn, the last one for ever, one for each command."""

    def behave(connection: socket.socket) -> None:
        left = list(replies)
        while received := connection.recv(1 << 16):
            for _ in range(received.count(b"*")):
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    return behave


def _hang(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def _drip(connection: socket.socket) -> None:
    connection.recv(1)
    connection.sendall(b"$100000\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(TIMEOUT_S / 10)  # part of the behaviour; ends with the connection


def _flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x" * 4096)


BEHAVIOURS: dict[str, Behaviour] = {
    "hangs": _hang,
    "closes": lambda connection: connection.close(),
    "drips": _drip,
    "floods": _flood,
    "garbage": _answer(b"\x00\xff\x13garbage\r\n"),
    "http": _answer(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "no number": _answer(b"$abc\r\n"),
    "negative length": _answer(b"$-7\r\n"),
    "huge length": _answer(b"$999999999999\r\nx"),
    "huge array": _answer(b"*999999999999\r\n"),
    "nested": _answer(b"*1\r\n" * 100_000),
    "loading": _answer(b"-LOADING Redis is loading the dataset in memory\r\n"),
    "number": _answer(b":1\r\n"),
    "text": _answer(b"+OK\r\n"),
    "array": _answer(b"*1\r\n$1\r\nx\r\n"),
    "noise as a record": _answer(b"$5\r\nnoise\r\n"),
    "not utf-8": _answer(b"-\xff\xfe\r\n"),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_server_that_misbehaves_is_only_slow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it costs: one time limit, then nothing until the pause is over."""
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 1000.0)
    with closing(BadServer(BEHAVIOURS[name])) as server:
        cache = EmbeddingCache(10_000, tiers=[tier_at(server.url)], rows=ROWS)
        started_at = time.monotonic()
        for number in range(3):
            cache.put(key(number), entry(5))
            assert cache.get(key(number)) is not None
            assert cache.get_many([key(100 + number), key(200 + number)]) == {}
        assert time.monotonic() - started_at < WAIT_S
        assert cache.stats().tiers[0].failures <= 1
    cache.close()


def test_nobody_there_is_only_slow() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    cache = EmbeddingCache(10_000, tiers=[tier_at(f"redis://127.0.0.1:{port}")], rows=ROWS)
    cache.put(key(1), entry(5))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None
    cache.close()


def test_a_late_answer_is_never_taken_for_the_next_ones() -> None:
    """The first reply comes after its reader gave up; the second asks for something else."""
    may_answer = threading.Event()

    def behave(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            may_answer.wait(WAIT_S)
            connection.sendall(b"$5\r\nfirst\r\n")

    with closing(BadServer(behave)) as server:
        tier = tier_at(server.url, 0.05)
        with pytest.raises(TierError):
            tier.get_many([b"one"])
        may_answer.set()
        deadline = time.monotonic() + WAIT_S
        while True:
            assert time.monotonic() < deadline
            with suppress(TierError):
                assert tier.get_many([b"two"]) == {b"two": b"first"}
                break
        tier.close()


def test_a_lane_that_hangs_takes_nothing_more_until_it_is_free() -> None:
    lane: Lane[int] = Lane("test")
    may_end = threading.Event()

    def hang() -> Iterator[int]:
        yield 1
        may_end.wait(WAIT_S)
        yield 2

    with pytest.raises(TierError, match="within"):
        list(lane.each(hang, 0.05))
    with pytest.raises(TierError, match="hangs"):
        list(lane.each(lambda: [3], 0.05))
    may_end.set()
    got: list[int] = []
    deadline = time.monotonic() + WAIT_S
    while not got:
        assert time.monotonic() < deadline
        with suppress(TierError):
            got = list(lane.each(lambda: [3, 4], WAIT_S))
    assert got == [3, 4]
    lane.close()


def test_an_address_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        tier_at("http://127.0.0.1")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match="pip install"):
        tier_at("redis://127.0.0.1")


def test_writes_fail_as_a_tier(server: Server) -> None:
    tier = tier_at(server.url)
    server.stop()
    with pytest.raises(TierError):
        tier.put_many({b"a": Stored(b"b", "")})
    with pytest.raises(TierError):
        tier.discard([b"a"])
    tier.close()
