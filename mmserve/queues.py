"""Message sockets between the dispatcher and the workers; the only module that imports zmq.

A ROUTER on the side that is asked, a DEALER on the other. Frames are opaque bytes of limited size. Over
tcp both ends prove who they are (CURVE), and the ROUTER lets in those on its list only. Knows nothing about
messages, requests or processes.
"""

from __future__ import annotations

import atexit
import ipaddress
import math
import os
import re
import secrets
import socket as sockets
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import zmq
from zmq.utils import z85

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

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"  # where libzmq asks who may enter

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}
_allowed: dict[bytes, bytes] = {}  # domain of a ROUTER -> public key of its clients
_open_sockets: set[int] = set()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveKeys:
    """What the processes of one deployment know each other by, in Z85. Who holds these is one of them."""

    server_public: str
    server_secret: str = field(repr=False)
    client_public: str
    client_secret: str = field(repr=False)


def make_keys() -> CurveKeys:
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    return CurveKeys(
        server_public=server[0].decode(),
        server_secret=server[1].decode(),
        client_public=client[0].decode(),
        client_secret=client[1].decode(),
    )


def ipc_endpoint(run_directory: Path) -> str:
    """A fresh, unguessable endpoint in a private directory."""
    return check_endpoint(f"ipc://{run_directory}/{secrets.token_hex(8)}", bind=True)


def tcp_endpoint(address: str, port: int = 0) -> str:
    """Port 0 binds any free one."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def free_endpoint(address: str) -> str:
    """An endpoint with a port that nobody uses now, for a process that is yet to start."""
    family = sockets.AF_INET6 if ":" in address else sockets.AF_INET
    try:
        with sockets.create_server((address, 0), family=family) as taken:
            return tcp_endpoint(address, taken.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"Expected {address} to be an address of this machine, but it is not") from error


def check_endpoint(endpoint: str, *, bind: bool, has_keys: bool = False) -> str:
    """Return the endpoint, or raise ConfigError unless only we can use it.

    Without keys that is this host and user, with keys one numeric address, which others may reach.
    """
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
    if address.is_unspecified or address.is_multicast:
        raise ConfigError("Expected one address in an endpoint, but got one that stands for many")
    if not (address.is_loopback or has_keys):
        raise ConfigError("Expected a loopback address in an endpoint without keys, but got another")
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
            _start_gatekeeper(_contexts[pid])
            atexit.register(_end_context, pid)
        return _contexts[pid]


def _start_gatekeeper(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Have a thread decide which keys may enter; it ends with the context."""
    socket = context.socket(zmq.REP)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(_ZAP_ENDPOINT)
    threading.Thread(target=_judge_keys, args=(socket,), name="mmserve-keys", daemon=True).start()


def _judge_keys(socket: zmq.Socket[bytes]) -> None:
    while True:
        try:
            version, request, domain, _, _, mechanism, *credentials = socket.recv_multipart()
        except zmq.ContextTerminated:
            socket.close()
            return
        is_known = mechanism == b"CURVE" and credentials == [_allowed.get(domain)]
        socket.send_multipart([version, request, b"200" if is_known else b"400", b"", b"", b""])


def _end_context(pid: int) -> None:
    """Give the last frames their LINGER_MS to leave before the process ends."""
    # with a socket still open, perhaps in a thread, this would wait for ever
    if pid == os.getpid() and not _open_sockets:
        _contexts.pop(pid).term()


def _open_socket(
    kind: zmq.SocketType,
    endpoint: str,
    identity: bytes | None,
    keys: CurveKeys | None,
    *,
    breaks_on_silence: bool = False,
) -> zmq.Socket[bytes]:
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
        options[zmq.IPV6] = int("[" in endpoint)
        if breaks_on_silence:
            options |= {zmq.HEARTBEAT_IVL: _HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS}
    _open_sockets.add(id(socket))
    for option, value in options.items():
        socket.setsockopt(option, value)
    if identity is not None:
        socket.setsockopt(zmq.ROUTING_ID, identity)
    if keys is not None and endpoint.startswith("tcp://"):
        _set_keys(socket, keys)
    return socket


def _set_keys(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    if socket.getsockopt(zmq.TYPE) == zmq.ROUTER:
        domain = secrets.token_hex(8).encode()
        _allowed[domain] = z85.decode(keys.client_public)
        socket.setsockopt(zmq.ZAP_DOMAIN, domain)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret.encode())
        return
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret.encode())


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
    """The end that many named peers connect to, at `endpoint`. Keys are used over tcp only."""

    def __init__(self, endpoint: str, keys: CurveKeys | None = None) -> None:
        check_endpoint(endpoint, bind=True, has_keys=keys is not None)
        socket = _open_socket(zmq.ROUTER, endpoint, None, keys)
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
    """The end with one peer, to which libzmq reconnects by itself.

    Frames sent while there is no connection wait here, in order, up to HIGH_WATER_MARK. Those
    handed to a connection that then breaks are lost, as is the state of the peer that died. With
    `breaks_on_silence` a peer over tcp that stands still for some seconds counts as one that died.
    """

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        keys: CurveKeys | None = None,
        *,
        breaks_on_silence: bool = False,
    ) -> None:
        check_endpoint(endpoint, bind=False, has_keys=keys is not None)
        if not 1 <= len(identity) <= 255 or identity[0] == 0:
            raise ConfigError("Expected an identity of 1 to 255 bytes that does not begin with zero")
        socket = _open_socket(zmq.DEALER, endpoint, identity, keys, breaks_on_silence=breaks_on_silence)
        socket.connect(endpoint)
        super().__init__(socket)
        self._outbox: deque[bytes] = deque()

    @property
    def num_waiting(self) -> int:
        """Frames that no connection has taken yet."""
        return len(self._outbox)

    @property
    def is_connected(self) -> bool:
        """Whether a peer has been found and would take a frame now."""
        self._check_owner()
        return bool(self._socket.poll(0, zmq.POLLOUT))

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
