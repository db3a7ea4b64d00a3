"""More clients than there is room for: few are let in, the others are told at once, nobody is lost (R30)."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import pytest

from mmserve.config import Limits, ServeConfig
from tests.server.fakes import QUESTION, FakePipeline, RunningServer, ask, running_server, wait_until

BODY = json.dumps({"messages": QUESTION, "max_tokens": 3}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@dataclass
class Crowd:
    """Clients that all hold a connection; each sends one request and notes when its answer came."""

    port: int
    statuses: Counter[int] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)  # of those that were refused
    without_hint: int = 0

    async def one(self, gate: asyncio.Event, delay_s: float, body: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await gate.wait()
            await asyncio.sleep(delay_s)
            began = time.perf_counter()
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            waited = time.perf_counter() - began
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            status = int(head.split()[1])
            self.statuses[status] += 1
            if status != 200:
                self.waits_s.append(waited)
                self.without_hint += b"retry-after" not in head.lower()
        finally:
            writer.close()

    async def rush(self, clients: int, over_s: float, body: bytes = BODY) -> None:
        """All connect first, then send one after the other."""
        gate = asyncio.Event()
        gathered = asyncio.gather(
            *(self.one(gate, over_s * number / clients, body) for number in range(clients))
        )
        await asyncio.sleep(0.1)
        gate.set()
        await gathered


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # what is waited for happens on other threads
        await asyncio.sleep(0.01)


def rss() -> int:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss


def rush(server: RunningServer, clients: int, over_s: float, accepted: int) -> Crowd:
    crowd = Crowd(server.port)

    async def run() -> None:
        rushing = asyncio.ensure_future(crowd.rush(clients, over_s))
        # who is let in is answered when all others have gone
        await until(lambda: len(crowd.waits_s) == clients - accepted)
        server.pipeline.gate.set()
        await rushing

    asyncio.run(asyncio.wait_for(run(), 300))
    return crowd


@pytest.mark.parametrize(
    ("clients", "capacity", "over_s", "most_s"),
    [(200, 10, 0.5, 2.0), pytest.param(2000, 80, 10.0, 0.05, marks=pytest.mark.slow)],
)
def test_a_crowd_is_refused_quickly_and_the_admitted_are_answered(
    clients: int, capacity: int, over_s: float, most_s: float
) -> None:
    """R30: 2,000 clients at 64 requests and a queue of 16: at most 80 accepted, the others within 50 ms."""
    config = ServeConfig(limits=Limits(max_running=capacity - capacity // 5, max_queued=capacity // 5))
    pipeline = FakePipeline(max_active=config.limits.max_running + config.limits.max_queued)
    with running_server(config, pipeline=pipeline) as server:
        ask(server)
        pipeline.gate.clear()
        before = rss()
        crowd = rush(server, clients, over_s, capacity)
        grown = rss() - before
        pipeline.wait_idle()
        assert ask(server).status_code == 200
        text = server.http.get("/metrics").text
    assert crowd.statuses == {200: capacity, 429: clients - capacity}
    assert crowd.without_hint == 0
    waits = sorted(crowd.waits_s)
    p50, p99 = waits[len(waits) // 2], waits[len(waits) * 99 // 100]
    print(f"{clients} clients: refused in p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, {grown >> 20} MiB")  # noqa: T201
    assert p99 < most_s
    assert grown < 100e6
    assert f'mmserve_requests_total{{outcome="overloaded"}} {clients - capacity}.0' in text


def test_a_full_server_refuses_before_it_reads_a_body() -> None:
    """R30: a body that is refused is neither parsed nor kept, and its client hears why."""
    pipeline = FakePipeline(max_active=1)
    with running_server(pipeline=pipeline) as server:
        pipeline.gate.clear()

        async def run() -> Counter[int]:
            first = asyncio.ensure_future(Crowd(server.port).rush(1, 0))
            await until(lambda: bool(pipeline.records))
            crowd = Crowd(server.port)
            # not even JSON: nobody looks
            await crowd.rush(4, 0, b"x" * (4 << 20))
            pipeline.gate.set()
            await first
            return crowd.statuses

        assert asyncio.run(run()) == {429: 4}
        wait_until(lambda: not pipeline.records)
        assert 'mmserve_held_bytes{what="bodies"} 0.0' in server.http.get("/metrics").text
