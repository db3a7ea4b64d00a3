"""Message sockets between the dispatcher and the workers; the only module that imports zmq.

A ROUTER on the dispatcher's side, a DEALER in each worker. Frames are opaque bytes of limited
size. Knows nothing about messages, requests or processes.
"""

from __future__ import annotations

import atexit
import ipaddress
import math
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final, Self

import zmq

from mmserve.errors import ConfigError, WireError
from mmserve.waker import Waker
from mmserve.wire import MAX_FRAME_BYTES

HIGH_WATER_MARK: Final = 1000  # frames per peer and direction
LINGER_MS: Final = 500
MAX_PER_POLL: Final = 256  # frames; keeps one poll bounded under a flood
_HEADER_BYTES: Final = 4096
_HEARTBEAT_MS: Final = 1000
_HEARTBEAT_TIMEOUT_MS: Final = 3000
_HANDSHAKE_MS: Final = 5000
_RECONNECT_MS: Final = 50
_MAX_RECONNECT_MS: Final = 1000
_MAX_IPC_BYTES: Final = 107  # of a Unix socket's path
_TCP: Final = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[0-9.]+):(\d{1,5})")

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}
_open_sockets: set[int] = set()
_lock = threading.Lock()


def ipc_endpoint(run_directory: Path) -> str:
    """A fresh, unguessable endpoint in a private directory."""
    return check_endpoint(f"ipc://{run_directory}/{secrets.token_hex(8)}", bind=True)


def check_endpoint(endpoint: str, *, bind: bool) -> str:
    """Return the endpoint, or raise ConfigError unless only this host and user can reach it."""
    if endpoint.startswith("ipc://"):
        _check_ipc(endpoint.removeprefix("ipc://"))
        return endpoint
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise ConfigError("Expected ipc://PATH or tcp://ADDRESS:PORT as an endpoint, but got another")
    try:
        address = ipaddress.ip_address(match.group(1).strip("[]"))
    except ValueError as error:
        raise ConfigError("Expected a numeric address in an endpoint, but got another") from error
    if not address.is_loopback:
        raise ConfigError("Expected a loopback address in an endpoint, but got one others can reach")
    if not (0 if bind else 1) <= int(match.group(2)) <= 65535:
        raise ConfigError(f"Expected a port of {0 if bind else 1} to 65535 in an endpoint")
    return endpoint


def _check_ipc(path: str) -> None:
    if not path.startswith("/") or len(os.fsencode(path)) > _MAX_IPC_BYTES or "*" in path or "\0" in path:
        raise ConfigError(f"Expected an absolute ipc path of at most {_MAX_IPC_BYTES} bytes")
    try:
        info = os.lstat(os.path.dirname(path))
    except OSError as error:
        raise ConfigError("Expected the directory of an ipc endpoint to exist, but it does not") from error
    private = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077
    if not private:
        raise ConfigError("Expected the directory of an ipc endpoint to be ours alone (mode 0700)")


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """One context per process; not pyzmq's shared one, which a notebook kernel uses too."""
    pid = os.getpid()
    with _lock:
        if pid not in _contexts:
            _contexts[pid] = zmq.Context()
            atexit.register(_end_context, pid)
        return _contexts[pid]


def _end_context(pid: int) -> None:
    """Give the last frames their LINGER_MS to leave before the process ends."""
    # with a socket still open, perhaps in a thread, this would wait for ever
    if pid == os.getpid() and not _open_sockets:
        _contexts.pop(pid).term()


def _open_socket(kind: zmq.SocketType, endpoint: str, identity: bytes | None) -> zmq.Socket[bytes]:
    """The one place that makes sockets: nothing is left at libzmq's unbounded defaults."""
    socket = _context().socket(kind)
    options = {
        zmq.SNDHWM: HIGH_WATER_MARK,
        zmq.RCVHWM: HIGH_WATER_MARK,
        zmq.LINGER: LINGER_MS,
        zmq.MAXMSGSIZE: MAX_FRAME_BYTES + _HEADER_BYTES,
        zmq.IMMEDIATE: 1,
        zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
        zmq.RECONNECT_IVL: _RECONNECT_MS,
        zmq.RECONNECT_IVL_MAX: _MAX_RECONNECT_MS,
        zmq.SNDTIMEO: 0,
        zmq.RCVTIMEO: 0,
    }
    if kind == zmq.ROUTER:
        options[zmq.ROUTER_MANDATORY] = 1
        # a worker that reconnects before its old connection is known dead takes over its name
        options[zmq.ROUTER_HANDOVER] = 1
    if endpoint.startswith("tcp://"):
        options |= {
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
            zmq.HEARTBEAT_TTL: _HEARTBEAT_TIMEOUT_MS,
            zmq.IPV6: int("[" in endpoint),
        }
    for option, value in options.items():
        socket.setsockopt(option, value)
    if identity is not None:
        socket.setsockopt(zmq.ROUTING_ID, identity)
    _open_sockets.add(id(socket))
    return socket


def _check_size(frame: bytes) -> None:
    # the peer's socket would drop the connection over a larger frame
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"Expected a frame of at most {MAX_FRAME_BYTES} bytes, but got {len(frame)}")


def _close_socket(socket: zmq.Socket[bytes]) -> None:
    socket.close()
    _open_sockets.discard(id(socket))


class _Queue:
    """A socket that belongs to the first thread that sends or polls; `wake` is for all threads."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self._owner: threading.Thread | None = None
        self.dropped = 0  # received messages with a wrong number of parts

    def wake(self) -> None:
        """Make a `poll` in progress, or the next one, return at once."""
        self._waker.wake()

    def close(self) -> None:
        """Frames already sent still have LINGER_MS to leave; harmless when repeated."""
        if self._owner is not None and self._owner.is_alive():
            self._check_owner()
        _close_socket(self._socket)
        self._waker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_owner(self) -> None:
        current = threading.current_thread()
        if self._owner is None:
            self._owner = current
        if self._owner is not current:
            raise RuntimeError(f"Expected a queue used by thread {self._owner.name}, but got {current.name}")

    def _send(self, parts: list[bytes]) -> bool:
        self._check_owner()
        _check_size(parts[-1])
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def _receive(self, timeout_s: float, num_parts: int) -> list[list[bytes]]:
        self._check_owner()
        ready = dict(self._poller.poll(math.ceil(max(timeout_s, 0.0) * 1000)))
        if self._waker.fileno() in ready:
            self._waker.clear()
        received: list[list[bytes]] = []
        if not ready.get(self._socket, 0) & zmq.POLLIN:
            return received
        for _ in range(MAX_PER_POLL):
            try:
                parts = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            if len(parts) == num_parts:
                received.append(parts)
            else:
                self.dropped += 1
        return received


class Router(_Queue):
    """The dispatcher's end: many named peers. `endpoint` is what dealers connect to."""

    def __init__(self, endpoint: str) -> None:
        check_endpoint(endpoint, bind=True)
        socket = _open_socket(zmq.ROUTER, endpoint, None)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            _close_socket(socket)
            raise ConfigError("Expected a free endpoint to bind, but it is in use or refused") from error
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        super().__init__(socket)

    def send(self, identity: bytes, frame: bytes) -> bool:
        """Queue a frame for a peer; False when it is not connected or does not read."""
        return self._send([identity, frame])

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """(identity, frame) of what has arrived; waits for the first at most `timeout_s`."""
        return [(parts[0], parts[1]) for parts in self._receive(timeout_s, 2)]


class Dealer(_Queue):
    """A worker's end: one peer, to which libzmq reconnects by itself.

    Frames sent while there is no connection wait here, in order, up to HIGH_WATER_MARK. Those
    handed to a connection that then breaks are lost, as is the state of the peer that died.
    """

    def __init__(self, endpoint: str, identity: bytes) -> None:
        check_endpoint(endpoint, bind=False)
        if not 1 <= len(identity) <= 255 or identity[0] == 0:
            raise ConfigError("Expected an identity of 1 to 255 bytes that does not begin with zero")
        socket = _open_socket(zmq.DEALER, endpoint, identity)
        socket.connect(endpoint)
        super().__init__(socket)
        self._outbox: deque[bytes] = deque()

    @property
    def num_waiting(self) -> int:
        """Frames that no connection has taken yet."""
        return len(self._outbox)

    def send(self, frame: bytes) -> bool:
        """Send a frame or let it wait for a connection; False when too many wait already."""
        _check_size(frame)
        self._drain()
        if not self._outbox and self._send([frame]):
            return True
        if len(self._outbox) >= HIGH_WATER_MARK:
            return False
        self._outbox.append(frame)
        return True

    def poll(self, timeout_s: float) -> list[bytes]:
        """Frames that have arrived; waits for the first at most `timeout_s`, less when one could leave."""
        self._drain()
        self._poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._outbox else 0))
        received = [parts[0] for parts in self._receive(timeout_s, 1)]
        self._drain()
        return received

    def flush(self, timeout_s: float) -> bool:
        """Wait until every frame is handed to the connection; False when `timeout_s` was too short."""
        deadline = time.monotonic() + timeout_s
        self._drain()
        while self._outbox and (left_s := deadline - time.monotonic()) > 0:
            self._socket.poll(math.ceil(left_s * 1000), zmq.POLLOUT)
            self._drain()
        return not self._outbox

    def _drain(self) -> None:
        while self._outbox and self._send([self._outbox[0]]):
            self._outbox.popleft()
