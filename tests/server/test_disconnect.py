"""R32: a client that leaves frees its request, at every stage, streamed or not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.server.fakes import VIDEO, RunningServer, ask, running_server, wait_until


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


def send_question(server: RunningServer, *, stream: bool) -> socket.socket:
    body = json.dumps({"messages": VIDEO, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + body)
    return connection


def check_freed(server: RunningServer) -> None:
    wait_until(lambda: len(server.pipeline.cancelled) == 1)
    wait_until(lambda: server.fetcher.held == 0)
    assert server.pipeline.records == {}
    assert ask(server).status_code == 200
    assert 'mmserve_requests_total{outcome="cancelled"} 1.0' in metrics(server)


def metrics(server: RunningServer) -> str:
    return server.http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_tokens_come_cancels(server: RunningServer, stream: bool) -> None:
    server.pipeline.gate.clear()
    with send_question(server, stream=stream) as connection:
        if stream:
            assert b"200 OK" in connection.recv(100)
        assert server.pipeline.started.wait(10)
    wait_until(lambda: bool(server.pipeline.cancelled))
    server.pipeline.gate.set()
    check_freed(server)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_media_is_fetched_cancels(server: RunningServer, stream: bool) -> None:
    server.fetcher.gate.clear()
    with send_question(server, stream=stream):
        assert server.fetcher.is_waiting.wait(10)
    wait_until(lambda: bool(server.pipeline.cancelled))
    assert server.pipeline.prompts == []
    server.fetcher.gate.set()
    check_freed(server)


def test_an_abrupt_end_cancels(server: RunningServer) -> None:
    server.pipeline.gate.clear()
    connection = send_question(server, stream=True)
    assert b"200 OK" in connection.recv(100)
    # the peer gets a reset instead of an end
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()
    wait_until(lambda: bool(server.pipeline.cancelled))
    server.pipeline.gate.set()
    check_freed(server)
