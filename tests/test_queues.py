"""queues.py: sockets only we can reach, by place or by key, bounded in every direction (R4, R5, R6)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq

from mmserve import queues
from mmserve.errors import ConfigError, WireError
from mmserve.queues import (
    HIGH_WATER_MARK,
    CurveKeys,
    Dealer,
    Router,
    check_endpoint,
    free_endpoint,
    ipc_endpoint,
    make_keys,
    tcp_endpoint,
)
from mmserve.wire import MAX_FRAME_BYTES

T = TypeVar("T")


@pytest.fixture
def private() -> Iterator[Path]:
    # not tmp_path: its length may pass what a Unix socket allows
    with tempfile.TemporaryDirectory(prefix="mmq-", dir="/tmp") as directory:
        yield Path(directory)


KEYS = make_keys()


@pytest.fixture(params=["ipc", "tcp", "curve"])
def router(request: pytest.FixtureRequest, private: Path) -> Iterator[Router]:
    endpoint = ipc_endpoint(private) if request.param == "ipc" else "tcp://127.0.0.1:0"
    with Router(endpoint, KEYS if request.param == "curve" else None) as router:
        yield router


def connected(router: Router, identity: bytes = b"w") -> Dealer:
    """A dealer whose handshake is over, so that both ends can send at once."""
    dealer = Dealer(router.endpoint, identity, KEYS if has_keys(router) else None)
    dealer.send(b"hello")
    assert dealer.flush(10)
    assert receive(router, 1) == [(identity, b"hello")]
    return dealer


def has_keys(router: Router) -> bool:
    return bool(router._socket.getsockopt(zmq.CURVE_SERVER))


def receive(router: Router, count: int) -> list[tuple[bytes, bytes]]:
    return gather(router.poll, count)


def gather(poll: Callable[[float], list[T]], count: int) -> list[T]:
    got: list[T] = []
    deadline = time.monotonic() + 10
    while len(got) < count and time.monotonic() < deadline:
        got += poll(0.5)
    return got


def test_frames_travel_both_ways_in_order(router: Router) -> None:
    with connected(router, b"worker-0") as dealer:
        for i in range(600):
            assert dealer.send(b"%d" % i)
        assert receive(router, 600) == [(b"worker-0", b"%d" % i) for i in range(600)]
        assert router.send(b"worker-0", b"one")
        assert router.send(b"worker-0", b"")
        assert gather(dealer.poll, 2) == [b"one", b""]


def test_unknown_peer_is_reported_not_awaited(router: Router) -> None:
    assert not router.send(b"nobody", b"x")


def test_peer_that_left_is_reported(router: Router) -> None:
    connected(router).close()
    deadline = time.monotonic() + 10
    while router.send(b"w", b"x") and time.monotonic() < deadline:
        router.poll(0.01)
    assert not router.send(b"w", b"x")


def test_peer_that_does_not_read_is_bounded(router: Router) -> None:
    with connected(router):
        # both ends queue at most their mark, the kernel a little more
        sent = 0
        while sent < 200_000 and router.send(b"w", b"x" * 1000):
            sent += 1
        assert HIGH_WATER_MARK <= sent < 200_000


def test_dealer_waits_for_its_router_and_finds_a_new_one(private: Path) -> None:
    endpoint = ipc_endpoint(private)
    with Dealer(endpoint, b"w") as dealer:
        assert dealer.send(b"early")
        assert dealer.num_waiting == 1
        assert not dealer.flush(0.01)
        with Router(endpoint) as router:
            assert dealer.flush(10)
            assert receive(router, 1) == [(b"w", b"early")]
        with Router(endpoint) as router:
            got: list[tuple[bytes, bytes]] = []
            deadline = time.monotonic() + 10
            while not got and time.monotonic() < deadline:
                dealer.send(b"late")
                dealer.poll(0.01)
                got = router.poll(0.05)
            assert got[0] == (b"w", b"late")
            assert router.send(b"w", b"again")


def test_dealer_keeps_a_bounded_number_of_frames(private: Path) -> None:
    with Dealer(ipc_endpoint(private), b"w") as dealer:
        assert all(dealer.send(b"x") for _ in range(HIGH_WATER_MARK))
        assert not dealer.send(b"x")
        with pytest.raises(WireError):
            dealer.send(b"x" * (MAX_FRAME_BYTES + 1))


def test_restarted_worker_takes_over_its_name(router: Router) -> None:
    with connected(router), connected(router) as new:
        assert router.send(b"w", b"hello")
        assert gather(new.poll, 1) == [b"hello"]


def test_largest_frame_passes_and_a_larger_one_is_refused(router: Router) -> None:
    with connected(router) as dealer:
        dealer.send(b"x" * MAX_FRAME_BYTES)
        assert len(receive(router, 1)[0][1]) == MAX_FRAME_BYTES
        with pytest.raises(WireError):
            dealer.send(b"x" * (MAX_FRAME_BYTES + 1))
        with pytest.raises(WireError):
            router.send(b"w", b"x" * (MAX_FRAME_BYTES + 1))


def test_oversize_frame_of_a_stranger_is_dropped_and_the_next_arrives(router: Router) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger, connected(router) as dealer:
        stranger.setsockopt(zmq.LINGER, 0)
        if has_keys(router):
            queues._set_keys(stranger, KEYS)
        stranger.connect(router.endpoint)
        stranger.send(b"x" * (2 * MAX_FRAME_BYTES))
        dealer.send(b"ours")
        frames: set[bytes] = set()
        deadline = time.monotonic() + 10
        while frames != {b"ours", b"normal"} and time.monotonic() < deadline:
            # what follows at once may be lost with the connection that the large frame cost
            stranger.send(b"normal")
            frames |= {frame for _, frame in router.poll(0.05)}
        assert frames == {b"ours", b"normal"}


def test_wrong_number_of_parts_is_dropped_and_counted(router: Router) -> None:
    with connected(router) as dealer:
        dealer._socket.send_multipart([b"a", b"b", b"c"])
        dealer.send(b"second")
        assert receive(router, 1) == [(b"w", b"second")]
        assert router.dropped == 1


def test_wake_interrupts_poll_from_another_thread(router: Router) -> None:
    polled = threading.Event()

    def poll() -> None:
        assert router.poll(60) == []
        polled.set()

    thread = threading.Thread(target=poll)
    thread.start()
    router.wake()
    assert polled.wait(10)
    thread.join()


def test_wake_after_close_is_harmless(private: Path) -> None:
    dealer = Dealer(ipc_endpoint(private), b"w")
    dealer.close()
    dealer.close()
    dealer.wake()


def test_queue_belongs_to_the_first_thread_that_uses_it(router: Router) -> None:
    router.poll(0)
    errors: list[BaseException] = []

    def intrude() -> None:
        for call in (lambda: router.poll(0), lambda: router.send(b"w", b"x"), router.close):
            try:
                call()
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(errors) == 3


def option(queue: Router | Dealer, number: int) -> int:
    value = queue._socket.getsockopt(number)
    assert isinstance(value, int)
    return value


def test_no_socket_is_left_at_a_default(router: Router) -> None:
    with connected(router) as dealer:
        for queue in (router, dealer):
            assert option(queue, zmq.SNDHWM) == option(queue, zmq.RCVHWM) == HIGH_WATER_MARK
            assert 0 <= option(queue, zmq.LINGER) <= 1000
            assert MAX_FRAME_BYTES < option(queue, zmq.MAXMSGSIZE) <= MAX_FRAME_BYTES + 4096
            assert option(queue, zmq.IMMEDIATE) == 1
            assert option(queue, zmq.SNDTIMEO) == option(queue, zmq.RCVTIMEO) == 0
            assert option(queue, zmq.HEARTBEAT_IVL) == 0, "who stands still for a while goes on"
            assert queue._socket.context is router._socket.context


def test_bound_port_is_on_loopback_only() -> None:
    with Router("tcp://127.0.0.1:0") as router:
        assert router.endpoint.startswith("tcp://127.0.0.1:")
        assert not router.endpoint.endswith(":0")
        with pytest.raises(ConfigError, match="in use"):
            Router(router.endpoint)


def test_ipc_endpoints_are_random(private: Path) -> None:
    assert ipc_endpoint(private) != ipc_endpoint(private)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:5555",
        "tcp://0.0.0.0:5555",
        "tcp://[::]:5555",
        "tcp://192.168.1.5:5555",
        "tcp://8.8.8.8:5555",
        "tcp://localhost:5555",
        "tcp://eth0:5555",
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:5555;10.0.0.1:5555",
        "tcp://0177.0.0.1:5555",
        "tcp://2130706433:5555",
        "tcp://127.0.0.1:5555 ",
        "tcp://[::ffff:10.0.0.1]:5555",
        "inproc://x",
        "pgm://127.0.0.1:5555",
        "ipc://*",
        "ipc://@abstract",
        "ipc://relative/path",
        "ipc:///nonexistent-directory/socket",
        "ipc:///tmp/socket",
        "ipc:///" + "x" * 120,
        "",
    ],
)
def test_endpoint_that_others_could_reach_is_refused(endpoint: str) -> None:
    for bind in (True, False):
        with pytest.raises(ConfigError):
            check_endpoint(endpoint, bind=bind)
    with pytest.raises(ConfigError):
        Router(endpoint)


def test_ipc_directory_must_be_private(private: Path) -> None:
    private.chmod(0o750)
    with pytest.raises(ConfigError):
        ipc_endpoint(private)
    private.chmod(0o700)
    (private / "link").symlink_to(private)
    with pytest.raises(ConfigError):
        ipc_endpoint(private / "link")


def test_connecting_to_no_port_or_as_nobody_is_refused(private: Path) -> None:
    assert check_endpoint("tcp://[::1]:0", bind=True)
    with pytest.raises(ConfigError):
        check_endpoint("tcp://127.0.0.1:0", bind=False)
    for identity in (b"", b"\0x", b"x" * 256):
        with pytest.raises(ConfigError):
            Dealer(ipc_endpoint(private), identity)


def test_last_frame_leaves_before_the_process_ends(router: Router) -> None:
    code = (
        "import sys, msgspec; from mmserve.queues import CurveKeys, Dealer\n"
        "keys = msgspec.json.decode(sys.argv[2], type=CurveKeys | None)\n"
        "with Dealer(sys.argv[1], b'w', keys) as d: d.send(b'x' * 500000); d.send(b'bye'); d.flush(10)\n"
    )
    keys = msgspec.json.encode(KEYS if has_keys(router) else None).decode()
    process = subprocess.Popen([sys.executable, "-c", code, router.endpoint, keys])
    assert [frame[-3:] for _, frame in receive(router, 2)] == [b"xxx", b"bye"]
    assert process.wait(timeout=10) == 0


def test_closed_queues_are_forgotten(private: Path) -> None:
    before = len(queues._open_sockets)
    with Router(ipc_endpoint(private)), Dealer(ipc_endpoint(private), b"w"):
        assert len(queues._open_sockets) == before + 2
    assert len(queues._open_sockets) == before


# keys


def test_only_a_known_key_gets_in() -> None:
    with Router("tcp://127.0.0.1:0", KEYS) as router:
        strangers = make_keys()
        unknown = CurveKeys(
            server_public=KEYS.server_public,
            server_secret="",
            client_public=strangers.client_public,
            client_secret=strangers.client_secret,
        )
        with (
            Dealer(router.endpoint, b"none") as none,
            Dealer(router.endpoint, b"unknown", unknown) as other,
            Dealer(router.endpoint, b"allowed", KEYS) as allowed,
        ):
            for dealer in (none, other, allowed):
                dealer.send(b"hello")
            got: list[tuple[bytes, bytes]] = []
            deadline = time.monotonic() + 10
            while not got and time.monotonic() < deadline:
                for dealer in (none, other, allowed):
                    dealer.poll(0.01)
                got += router.poll(0.05)
            # those that were refused try again meanwhile
            for _ in range(10):
                for dealer in (none, other):
                    assert dealer.poll(0.01) == []
                    assert not dealer.is_connected
                got += router.poll(0.02)
            assert got == [(b"allowed", b"hello")]
            assert allowed.is_connected


def test_a_dealer_takes_no_router_without_its_servers_key() -> None:
    """Who listens where our dispatcher should is not spoken to."""
    for theirs in (make_keys(), None):
        with Router("tcp://127.0.0.1:0", theirs) as impostor, Dealer(impostor.endpoint, b"w", KEYS) as dealer:
            dealer.send(b"secret")
            for _ in range(10):
                dealer.poll(0.01)
                assert impostor.poll(0.02) == []
            assert dealer.num_waiting == 1


@pytest.mark.parametrize("address", ["192.168.1.5", "8.8.8.8", "[fd00::1]"])
def test_an_address_that_others_reach_needs_keys(address: str) -> None:
    endpoint = f"tcp://{address}:5555"
    for bind in (True, False):
        assert check_endpoint(endpoint, bind=bind, has_keys=True) == endpoint
        with pytest.raises(ConfigError, match="without keys"):
            check_endpoint(endpoint, bind=bind)
    with pytest.raises(ConfigError, match="without keys"):
        Router(endpoint)
    with pytest.raises(ConfigError, match="without keys"):
        Dealer(endpoint, b"w")


@pytest.mark.parametrize("endpoint", ["tcp://*:5", "tcp://0.0.0.0:5", "tcp://[::]:5", "tcp://224.0.0.1:5"])
def test_an_address_that_stands_for_many_is_refused_even_with_keys(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        Router(endpoint, KEYS)


def test_secrets_are_not_shown() -> None:
    assert KEYS.server_secret not in repr(KEYS)
    assert KEYS.client_secret not in repr(KEYS)


def test_a_free_endpoint_can_be_bound_and_a_foreign_address_cannot() -> None:
    assert tcp_endpoint("::1", 7) == "tcp://[::1]:7"
    with Router(free_endpoint("127.0.0.1"), KEYS) as router:
        assert not router.endpoint.endswith(":0")
    with pytest.raises(ConfigError, match="address of this machine"):
        free_endpoint("192.0.2.1")
