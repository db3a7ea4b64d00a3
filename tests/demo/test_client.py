"""The page's client against the real HTTP front door, without a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.client import MAX_FILE_BYTES, AskError, Client, Delta, Options, Report
from mmserve.config import ServeConfig
from mmserve.errors import MediaError
from tests.server.fakes import ANSWER, RunningServer, running_server, wait_until


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running_server(ServeConfig(api_key=("key",))) as running:
        yield running


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    yield shared
    shared.pipeline.gate.set()
    shared.pipeline.error = None
    shared.pipeline.is_ready = True
    shared.pipeline.wait_idle()
    shared.pipeline.cancelled.clear()
    shared.pipeline.prompts.clear()


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(f"{server.url}/", "key")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video, but nobody looks")
    return path


async def answer(client: Client, video: Path, options: Options | None = None) -> list[Delta | Report]:
    stream = client.ask("What moves?", video, options or Options(), asyncio.Event())
    return [news async for news in stream]


def test_an_answer_and_its_report(client: Client, server: RunningServer, video: Path) -> None:
    options = Options(prune="holitom", keep=0.5, kv="snapkv", kv_budget=0.25, num_frames=4, max_tokens=9)
    *deltas, report = asyncio.run(answer(client, video, options))
    assert "".join(news.text for news in deltas if isinstance(news, Delta)) == ANSWER
    assert isinstance(report, Report)
    assert report.data["usage"]["visual_tokens"] == 20
    (prompt,) = server.pipeline.prompts
    assert (prompt.methods.prune, prompt.methods.keep) == ("holitom", 0.5)
    assert (prompt.methods.kv, prompt.methods.kv_budget) == ("snapkv", 0.25)
    assert prompt.media[0].options.num_frames == 4
    assert prompt.sampling.max_tokens == 9


def test_stop_closes_the_connection(client: Client, server: RunningServer, video: Path) -> None:
    server.pipeline.gate.clear()

    async def scenario() -> list[Delta | Report]:
        stop, seen = asyncio.Event(), []
        async for news in client.ask("What moves?", video, Options(), stop):
            seen.append(news)
            stop.set()
        return seen

    assert asyncio.run(scenario()) == [Delta("red")]
    wait_until(lambda: len(server.pipeline.cancelled) == 1)


@pytest.mark.parametrize("when", ["before the first token", "after it"])
def test_errors_become_readable(client: Client, server: RunningServer, video: Path, when: str) -> None:
    error = MediaError("The video is broken")

    async def scenario() -> None:
        stream = client.ask("What moves?", video, Options(), asyncio.Event())
        if when == "after it":
            await anext(stream)
            (request_id,) = server.pipeline.records
            server.pipeline.fail(request_id, error)
        with pytest.raises(AskError, match="The video is broken"):
            async for _ in stream:
                pass

    if when == "after it":
        server.pipeline.gate.clear()
    else:
        server.pipeline.error = error
    asyncio.run(scenario())


def test_files_that_cannot_be_sent_are_refused_here(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    large = tmp_path / "large.mp4"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(AskError, match="of these kinds"):
        asyncio.run(answer(client, text))
    with pytest.raises(AskError, match="at most 23 MB"):
        asyncio.run(answer(client, large))


def test_no_server_is_said(video: Path) -> None:
    # port 9 is for discarding; nobody listens
    nobody = Client("http://127.0.0.1:9")
    with pytest.raises(AskError, match="No server answers"):
        asyncio.run(answer(nobody, video))
    assert asyncio.run(nobody.status()) == (False, "the server does not answer")


def test_status_follows_the_server(client: Client, server: RunningServer) -> None:
    assert asyncio.run(client.status()) == (True, "tiny")
    assert asyncio.run(Client(server.url).status()) == (False, "the server asks for another key")
    server.pipeline.is_ready = False
    assert asyncio.run(client.status()) == (False, "the server is starting")
