"""A response of server-sent events that ends when its client leaves or stops reading.

Knows nothing about what the events say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmserve.server.answers import ClientGone, unless
from mmserve.server.feed import MAX_STALL_S

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends `events` as they come and calls `close` at the end, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], *, request_id: str) -> None:
        super().__init__(headers=_HEADERS | {"X-Request-Id": request_id})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # a reader that takes nothing for that long has left in all but name
            with contextlib.suppress(ClientGone, TimeoutError):
                await unless(client_gone(receive), self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in self._events:
            async with asyncio.timeout(MAX_STALL_S):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def client_gone(receive: Receive) -> None:
    """Returns when the connection is closed; call it once the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
