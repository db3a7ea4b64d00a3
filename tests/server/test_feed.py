"""R31: what a slow reader can hold back is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mmserve.request import Chunk, FinishReason
from mmserve.sampling import Logprob
from mmserve.server import feed as feed_module
from mmserve.server.feed import MAX_BYTES, MAX_EVENTS, Feed, SlowReader


def run(scenario: Callable[[Feed, list[str]], Coroutine[Any, Any, None]]) -> list[str]:
    given_up: list[str] = []

    async def main() -> None:
        await scenario(Feed(asyncio.get_running_loop(), lambda: given_up.append("gave up")), given_up)

    asyncio.run(main())
    return given_up


async def put(feed: Feed, *chunks: Chunk) -> None:
    def put_all() -> None:
        for chunk in chunks:
            feed.put(chunk)

    await asyncio.to_thread(put_all)
    await asyncio.sleep(0)


def test_news_arrive_in_order() -> None:
    async def scenario(feed: Feed, _: list[str]) -> None:
        await put(feed, *(Chunk(text=str(index)) for index in range(5)))
        got = [await feed.get() for _ in range(5)]
        assert [chunk.text for chunk in got if isinstance(chunk, Chunk)] == ["0", "1", "2", "3", "4"]

    assert run(scenario) == []


def test_many_chunks_join_and_nothing_is_lost() -> None:
    count = 3 * MAX_EVENTS

    async def scenario(feed: Feed, _: list[str]) -> None:
        logprobs = ({0: Logprob(logprob=-1.0, rank=1)},)
        await put(feed, *(Chunk(text="x", token_ids=(index,), logprobs=logprobs) for index in range(count)))
        got = [await feed.get() for _ in range(MAX_EVENTS)]
        chunks = [chunk for chunk in got if isinstance(chunk, Chunk)]
        assert "".join(chunk.text for chunk in chunks) == "x" * count
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(count))
        assert sum(len(chunk.logprobs or ()) for chunk in chunks) == count

    assert run(scenario) == []


def test_chunks_join_only_within_their_answer() -> None:
    count = 3 * MAX_EVENTS

    async def scenario(feed: Feed, _: list[str]) -> None:
        await put(feed, *(Chunk(text="x", token_ids=(place,), index=place % 4) for place in range(count)))
        await put(feed, Chunk(text="", index=2, finish_reason=FinishReason.STOP), Chunk(text="new", index=9))
        got = [await feed.get() for _ in range(MAX_EVENTS + 1)]
        chunks = [chunk for chunk in got if isinstance(chunk, Chunk)]
        for index in range(4):
            mine = [chunk for chunk in chunks if chunk.index == index]
            tokens = [token for chunk in mine for token in chunk.token_ids]
            assert tokens == list(range(index, count, 4))
            assert mine[-1].finish_reason == (FinishReason.STOP if index == 2 else None)
        assert [chunk.text for chunk in chunks if chunk.index == 9] == ["new"]

    assert run(scenario) == []


def test_too_many_bytes_end_the_stream() -> None:
    async def scenario(feed: Feed, given_up: list[str]) -> None:
        await put(feed, Chunk(text="x" * MAX_BYTES))
        assert given_up == []
        await put(feed, Chunk(text="x"))
        assert isinstance(await feed.get(), SlowReader)

    assert run(scenario) == ["gave up"]


def test_a_full_queue_that_nobody_reads_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_STALL_S", 0.0)

    async def scenario(feed: Feed, _: list[str]) -> None:
        await put(feed, *(Chunk(text="x") for _ in range(MAX_EVENTS + 1)))
        async with asyncio.timeout(5):
            while not isinstance(await feed.get(), SlowReader):
                pass

    assert run(scenario) == ["gave up"]


def test_reading_stops_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_STALL_S", 3600.0)

    async def scenario(feed: Feed, _: list[str]) -> None:
        await put(feed, *(Chunk(text="x") for _ in range(MAX_EVENTS + 1)))
        assert feed._stalled is not None
        await feed.get()
        assert feed._stalled is None

    assert run(scenario) == []
