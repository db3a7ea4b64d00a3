"""Talks to a running server as any OpenAI client would: one streamed answer, and whether it is ready.

Knows nothing about the page.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MAX_FILE_BYTES = 23_000_000  # as base64 it still fits into the largest body a server takes
_CONNECT_S = 5.0
_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".ts": "video/mp2t",
}


class AskError(Exception):
    """Something a person can read: what went wrong with a question."""


@dataclass(frozen=True, slots=True)
class Delta:
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """The server's `usage.mmserve`."""

    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person chose beside the question."""

    prune: str = "none"
    keep: float = 1.0
    kv: str = "none"
    kv_budget: float = 1.0
    num_frames: int = 16
    max_tokens: int = 64

    def as_body(self) -> dict[str, Any]:
        """Only what differs from doing nothing, so that a server's own defaults stay visible."""
        own: dict[str, Any] = {"report": True, "num_frames": self.num_frames}
        if self.prune != "none":
            own |= {"prune": self.prune, "keep": self.keep}
        if self.kv != "none":
            own |= {"kv": self.kv, "kv_budget": self.kv_budget}
        return {"max_tokens": self.max_tokens, "mmserve": own}


class Client:
    """A server by its URL, with the key it may want."""

    def __init__(self, server_url: str, api_key: str | None = None) -> None:
        self.url = server_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def ask(
        self, question: str, video: Path, options: Options, stop: asyncio.Event
    ) -> AsyncIterator[Delta | Report]:
        """The answer as it comes, then its report. Setting `stop` closes the connection, which cancels
        the request in the server, and ends the iteration."""
        content = [
            {"type": "video_url", "video_url": {"url": await asyncio.to_thread(_data_url, video)}},
            {"type": "text", "text": question},
        ]
        body = {"messages": [{"role": "user", "content": content}], "stream": True} | options.as_body()
        lines = self._lines(body)
        try:
            while (line := await _unless(stop, lines)) is not None:
                event = json.loads(line)
                if "error" in event:
                    raise AskError(event["error"]["message"])
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield Delta(text)
                if report := (event.get("usage") or {}).get("mmserve"):
                    yield Report(report)
        finally:
            await lines.aclose()

    async def status(self) -> tuple[bool, str]:
        """Whether the server can answer now, and what to say about it."""
        try:
            async with self._http() as http:
                ready = await http.get("/readyz")
                if ready.status_code != 200:
                    return False, "the server is starting"
                models = await http.get("/v1/models")
                if models.status_code == 401:
                    return False, "the server asks for another key"
                return True, str(models.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError):
            return False, "the server does not answer"

    async def _lines(self, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        try:
            async with (
                self._http() as http,
                http.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    raise AskError(_message(await response.aread(), response.status_code))
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield line.removeprefix("data: ")
                raise AskError("The server broke off in the middle of its answer")
        except httpx.ConnectError as error:
            raise AskError(f"No server answers at {self.url}") from error
        except httpx.HTTPError as error:
            raise AskError("The connection to the server was lost") from error

    def _http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=timeout, trust_env=False)


async def _unless(stop: asyncio.Event, lines: AsyncGenerator[str, None]) -> str | None:
    """The next line, or None at the end or once `stop` is set."""
    reading = asyncio.ensure_future(anext(lines, None))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else reading.result()
    finally:
        stopping.cancel()
        if not reading.done():
            # closes the connection
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


def _data_url(video: Path) -> str:
    size = video.stat().st_size
    if size > MAX_FILE_BYTES:
        most = MAX_FILE_BYTES / 1e6
        raise AskError(f"The file has {size / 1e6:.1f} MB; this page sends at most {most:.0f} MB")
    media_type = _MEDIA_TYPES.get(video.suffix.lower())
    if media_type is None:
        raise AskError(f"Please choose a video of one of these kinds: {', '.join(_MEDIA_TYPES)}")
    return f"data:{media_type};base64,{base64.b64encode(video.read_bytes()).decode()}"


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"The server answered with status {status}"
