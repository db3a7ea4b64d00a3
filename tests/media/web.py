"""A pretended web for the tests of fetching: sites, resolvers, servers on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from mmserve.media.fetch import Fetcher, Resolver
from mmserve.media.limits import MediaLimits
from mmserve.request import MediaOptions, MediaRef

PNG = b"\x89PNG\r\n\x1a\n" + b"not really a picture"
DIGEST = hashlib.sha256(PNG).hexdigest()
LIMITS = MediaLimits(max_image_bytes=100_000, max_image_fetch_s=5.0)
Page = tuple[int, dict[str, str], bytes]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def resolver(*answers: Sequence[str]) -> Resolver:
    """Gives these answers one after the other, the last one for ever."""
    left = list(answers)

    async def answer(host: str, port: int) -> list[str]:
        return list(left.pop(0) if len(left) > 1 else left[0])

    return answer


async def system(host: str, port: int) -> list[str]:
    """Literal addresses as the system reads them, in all their spellings; no name is looked up."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]


class Site:
    """A transport that records what would be dialled and answers from a table of paths."""

    def __init__(self, pages: dict[str, Page] | None = None) -> None:
        self.requests: list[httpx.Request] = []
        self._pages = pages or {}

    def transport(self) -> httpx.MockTransport:
        def answer(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            status, headers, body = self._pages.get(request.url.path, (200, {}, PNG))
            return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

        return httpx.MockTransport(answer)


def get(fetcher: Fetcher, url: str, options: MediaOptions | None = None, *, video: bool = False) -> MediaRef:
    return asyncio.run(fetcher.fetch(url, "video" if video else "image", options))


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A TCP server on loopback; yields its port and leaves no connection open."""
    running: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.transport.abort()

    def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # a task that is cancelled before it runs closes nothing
        writers.add(writer)
        running.add(asyncio.ensure_future(served(reader, writer)))

    async with await asyncio.start_server(tracked, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            for _ in range(8):  # to let in who has just come takes some turns, on a server that is open
                await asyncio.sleep(0)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for writer in writers:
                writer.transport.abort()
                with suppress(ConnectionError):
                    await writer.wait_closed()
