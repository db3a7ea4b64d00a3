"""Carries one request's news from the pipeline's thread to its reader on the event loop, bounded.

Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from mmserve.errors import MMServeError
from mmserve.request import Chunk, RequestOutput

News = Chunk | RequestOutput | MMServeError

MAX_EVENTS = 256
MAX_BYTES = 1 << 20
MAX_STALL_S = 30.0
_LOGPROB_BYTES = 128  # roughly, per reported candidate


class SlowReader(MMServeError):
    status = 503
    code = "slow_reader"


class Feed:
    """A queue of about `MAX_EVENTS` chunks and `MAX_BYTES` bytes; later ones join their answer's last.

    When it is over `MAX_BYTES`, or was full for `MAX_STALL_S` while nobody read, what it holds is
    dropped, `give_up` is called once and the reader gets SlowReader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[], None]) -> None:
        self._loop = loop
        self._give_up = give_up
        self._events: deque[News] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._stalled: asyncio.TimerHandle | None = None
        self._closed = False

    def put(self, news: News) -> None:
        """Call from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, news)

    async def get(self) -> News:
        await self._ready.wait()
        news = self._events.popleft()
        if isinstance(news, Chunk):
            self._bytes -= _size(news)
        if not self._events:
            self._ready.clear()
        self._stop_timer()
        return news

    def close(self) -> None:
        """Nobody reads any more."""
        self._closed = True
        self._events.clear()
        self._stop_timer()

    def _take(self, news: News) -> None:
        if self._closed:
            return
        if len(self._events) >= MAX_EVENTS and isinstance(news, Chunk):
            self._join(news)
            if self._stalled is None:
                self._stalled = self._loop.call_later(MAX_STALL_S, self._drop)
        else:
            self._events.append(news)
        if isinstance(news, Chunk):
            self._bytes += _size(news)
        self._ready.set()
        if self._bytes > MAX_BYTES:
            self._drop()

    def _join(self, chunk: Chunk) -> None:
        """Put it with the last one of its answer; one that has none yet comes on top."""
        for place in reversed(range(len(self._events))):
            waiting = self._events[place]
            if isinstance(waiting, Chunk) and waiting.index == chunk.index:
                self._events[place] = _joined(waiting, chunk)
                return
        self._events.append(chunk)

    def _drop(self) -> None:
        self._closed = True
        self._stop_timer()
        self._events.clear()
        self._events.append(SlowReader("Expected the answer to be read as it came, but it was not"))
        self._ready.set()
        self._give_up()

    def _stop_timer(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return msgspec.structs.replace(
        first,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=(first.logprobs or ()) + (second.logprobs or ()) or None,
        finish_reason=second.finish_reason,
    )


def _size(chunk: Chunk) -> int:
    candidates = sum(len(entry) for entry in chunk.logprobs or ())
    return len(chunk.text.encode("utf-8", "replace")) + 8 * len(chunk.token_ids) + _LOGPROB_BYTES * candidates
