"""R19: nothing but the two probes answers without a key, whatever the spelling of the path."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mmserve.config import ServeConfig
from mmserve.request import tenant_of
from mmserve.server.auth import OPEN_PATHS, ApiKeyMiddleware
from tests.server.fakes import RunningServer, ask, running_server

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(ServeConfig(api_key=("first-key", "second-key"))) as running:
        yield running


def paths(server: RunningServer) -> set[str]:
    found = set(server.app.openapi()["paths"])
    found |= {route.path for route in server.app.routes if isinstance(route, Route)}
    return {path.replace("{model_id:path}", "tiny").replace("{model_id}", "tiny") for path in found}


def test_every_route_asks_for_a_key(server: RunningServer) -> None:
    found = paths(server)
    assert {"/v1/chat/completions", "/metrics", "/health", "/openapi.json", "/version"} <= found
    for path in found | {"/", "/nothing", "/docs"}:
        for method in METHODS:
            status = server.http.request(method, path).status_code
            if path in OPEN_PATHS:
                assert status in (200, 405)
            else:
                assert status == 401, f"{method} {path}"


@pytest.mark.parametrize(
    "path",
    [
        "//livez",
        "/livez/",
        "/LIVEZ",
        "/livez/../metrics",
        "/readyz%2f..%2fmetrics",
        "/readyz/../v1/models",
        "/%2e/metrics",
        "/./metrics",
        "/livez;/metrics",
        "/metrics?/livez",
    ],
)
def test_no_spelling_of_a_path_gets_around_it(server: RunningServer, path: str) -> None:
    request = server.http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert server.http.send(request).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key"])
def test_a_wrong_key_is_refused(server: RunningServer, header: str) -> None:
    response = server.http.get("/v1/models", headers={"Authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


def test_each_key_works_and_has_caches_of_its_own(server: RunningServer) -> None:
    """R18: a salt per key, and per salt of a key; all salts of a key have one share of room."""
    for key in ("first-key", "second-key", "first-key"):
        assert ask(server, key=key).status_code == 200
    first, second, third = (prompt.salt for prompt in server.pipeline.prompts[-3:])
    assert first == third != second
    assert "" not in (first, second)
    for number in range(2):
        assert ask(server, key="first-key", cache_salt=f"/{number}").status_code == 200
    salts = [prompt.salt for prompt in server.pipeline.prompts[-2:]]
    assert len({first, *salts}) == 3
    assert {tenant_of(salt) for salt in salts} == {tenant_of(first)} != {tenant_of(second)}


@pytest.mark.parametrize("root_path", ["", "/livez", "/api"])
@pytest.mark.parametrize("kind", ["websocket", "other"])
def test_websockets_and_unknown_connections_need_a_key_too(kind: str, root_path: str) -> None:
    reached: list[Scope] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def connect(headers: list[tuple[bytes, bytes]]) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope: dict[str, Any] = {"type": kind, "path": "/livez", "root_path": root_path, "headers": headers}
        await ApiKeyMiddleware(inner, ["key"])(scope, receive, send)
        return sent

    for headers in ([], [(b"authorization", b"Bearer wrong")]):
        sent = asyncio.run(connect(headers))
        assert reached == []
        if kind == "websocket":
            assert sent[0]["type"] == "websocket.close"
    asyncio.run(connect([(b"authorization", b"Bearer key")]))
    assert len(reached) == 1
