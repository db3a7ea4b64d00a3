"""AsyncLLM around a fake worker: what `LLM` does, beside other tasks, and cancelled with its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mmserve import AsyncLLM
from mmserve.errors import MediaError, Unavailable
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams
from tests.offline.fakes import FAILS, HANGS, STALLS, FakeWorker, say, wait_until

Run = Callable[[Callable[[AsyncLLM], Awaitable[None]]], None]
WORDS = ["red", "blue", "square", "left"]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return FakeWorker.installed(monkeypatch)


@pytest.fixture
def run(worker: FakeWorker) -> Run:
    """Runs a scenario on a loop; afterwards nothing may be left in the pipeline."""

    def run(scenario: Callable[[AsyncLLM], Awaitable[None]]) -> None:
        async def main() -> None:
            async with AsyncLLM() as llm, asyncio.timeout(30):
                await scenario(llm)
                await asyncio.to_thread(wait_until, lambda: active(llm) == 0)

        asyncio.run(main())

    return run


def active(llm: AsyncLLM) -> int:
    return llm._runtime.pipeline.counts()["active"]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_tasks_are_answered_side_by_side(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        one_by_one = asyncio.gather(*(llm.chat(say(word)) for word in WORDS))
        together, continued = await asyncio.gather(
            llm.chat([say(word) for word in WORDS], progress=True), llm.generate(["a red", "the left"])
        )
        assert texts(together) == WORDS == [texts(outputs)[0] for outputs in await one_by_one]
        assert texts(continued) == [" red", " left"]

    run(scenario)


def test_a_stream_ends_with_its_answer_or_its_error(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        assert [chunk.text async for chunk in llm.stream(say("square"))] == ["square"]
        with pytest.raises(MediaError, match="broken"):
            async for _ in llm.stream(say("square"), SamplingParams(top_k=FAILS)):
                pass
        with pytest.raises(MediaError, match="broken"):
            await llm.chat([say("red"), say("blue")], [SamplingParams(top_k=FAILS), SamplingParams()])

    run(scenario)


def test_cancelling_a_task_cancels_its_requests(run: Run, worker: FakeWorker) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        hanging = SamplingParams(top_k=HANGS)
        for asked in (llm.chat([say(word) for word in WORDS], hanging), llm.generate("a red", hanging)):
            worker.prompts.clear()
            task = asyncio.create_task(asked)
            await asyncio.to_thread(wait_until, lambda: bool(worker.prompts))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert texts(await llm.chat(say("red"))) == ["red"]

    run(scenario)


def test_closing_a_stream_cancels_its_request(run: Run, worker: FakeWorker) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        chunks = llm.stream(say("square"), SamplingParams(top_k=STALLS))
        assert (await anext(chunks)).text == "square"
        await chunks.aclose()
        await asyncio.to_thread(wait_until, lambda: len(worker.cancelled) == 1)
        waiting = asyncio.create_task(_read(llm.stream(say("left"), SamplingParams(top_k=HANGS))))
        await asyncio.to_thread(wait_until, lambda: len(worker.prompts) == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario)


async def _read(chunks: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def test_a_loop_that_ends_leaves_its_requests_cancelled(worker: FakeWorker) -> None:
    llm = AsyncLLM()

    async def leave() -> None:
        chunks = llm.stream(say("square"), SamplingParams(top_k=STALLS))
        await anext(chunks)
        task = asyncio.create_task(llm.chat(say("left"), SamplingParams(top_k=HANGS)))
        await asyncio.to_thread(wait_until, lambda: len(worker.prompts) == 2)
        assert not task.done()

    asyncio.run(leave())
    wait_until(lambda: active(llm) == 0)
    assert texts(asyncio.run(llm.chat(say("red")))) == ["red"]
    asyncio.run(llm.close())
    with pytest.raises(Unavailable):
        asyncio.run(llm.chat(say("red")))
