"""The API process: its configuration, its signals (R35), and that nobody's answer is cut short."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable

import httpx
import pytest

from mmserve.config import Limits, ServeConfig
from mmserve.errors import ConfigError
from mmserve.media.limits import MediaLimits
from mmserve.server.app import create_app
from mmserve.server.main import listen, make_server, serve
from tests.server.fakes import ANSWER, QUESTION, FakeFetcher, FakePipeline, chat_format, events, wait_until

Scenario = Callable[[httpx.AsyncClient, FakePipeline], Awaitable[None]]


def drained(scenario: Scenario, drain_s: float) -> FakePipeline:
    """Run a server on this thread, as the process does, with a client beside it."""
    pipeline = FakePipeline()
    config = ServeConfig()
    app = create_app(
        pipeline=pipeline.as_pipeline(),
        chat=chat_format(),
        fetcher=FakeFetcher(),
        config=config,
        model_name="tiny",
    )

    async def main() -> None:
        listener = listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(
            serve(make_server(app, config.limits), app.state.door, listener, drain_s)
        )
        async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
            await scenario(client, pipeline)
        async with asyncio.timeout(10):
            await serving

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(main())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        pipeline.close()
    return pipeline


async def until(holds: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, holds)


async def status(client: httpx.AsyncClient, path: str) -> int:
    return (await client.get(path)).status_code


def question(*, stream: bool) -> dict[str, object]:
    return {"messages": list(QUESTION), "stream": stream}


@pytest.mark.parametrize("stream", [False, True])
def test_a_signal_lets_admitted_requests_finish_and_nobody_else_in(stream: bool) -> None:
    async def scenario(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
        pipeline.gate.clear()
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=question(stream=stream)))
        await until(pipeline.started.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        while await status(client, "/readyz") == 200:
            pass
        assert await status(client, "/livez") == 200
        late = await client.post("/v1/chat/completions", json=question(stream=stream))
        assert late.status_code == 503
        assert late.headers["retry-after"] == "1"
        pipeline.gate.set()
        response = await asking
        assert response.status_code == 200
        if stream:
            text = "".join(each["choices"][0]["delta"].get("content", "") for each in events(response.text))
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text == ANSWER

    assert drained(scenario, drain_s=10).cancelled == []


def test_what_does_not_finish_in_time_is_told_so() -> None:
    async def scenario(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
        pipeline.gate.clear()
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=question(stream=True)))
        await until(pipeline.started.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        *_, last = events((await asking).text)
        assert last["error"]["code"] == "unavailable"

    assert len(drained(scenario, drain_s=0.05).cancelled) == 1


def test_a_second_signal_does_not_wait() -> None:
    async def scenario(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
        pipeline.gate.clear()
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=question(stream=False)))
        await until(pipeline.started.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        while await status(client, "/readyz") == 200:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert (await asking).status_code == 503

    assert len(drained(scenario, drain_s=3600).cancelled) == 1


def test_an_idle_server_ends_at_once() -> None:
    async def scenario(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
        assert await status(client, "/readyz") == 200
        os.kill(os.getpid(), signal.SIGTERM)

    drained(scenario, drain_s=3600)


def test_a_busy_port_is_explained() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_connections_do_not_wait_to_fill_a_packet() -> None:
    """Else every small answer on a kept connection takes 40 ms."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_media_limits_are_those_of_the_deployment() -> None:
    limits = MediaLimits.from_config(Limits(max_video_bytes=123, min_side=7))
    assert (limits.max_video_bytes, limits.min_side) == (123, 7)


def test_threads_end_with_the_server() -> None:
    before = threading.active_count()

    async def scenario(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
        assert (await client.post("/v1/chat/completions", json=question(stream=False))).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)

    drained(scenario, drain_s=10)
    wait_until(lambda: threading.active_count() <= before)
