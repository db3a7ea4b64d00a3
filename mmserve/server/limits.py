"""Refuses what is too large before it is parsed: headers, bodies, and JSON built to hurt a parser.

Knows nothing about what a body means.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmserve.config import Limits
from mmserve.errors import BadRequest, MMServeError, TooLarge
from mmserve.media.budget import ByteBudget
from mmserve.server.errors import error_response

MAX_JSON_VALUES = 200_000
# whole strings, so that what they contain does not count, and the characters that build structure; the
# last quote is optional, so that a string without an end is read once only
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)


class LimitsMiddleware:
    """Checks headers at once and a body while it arrives.

    A body is in memory until its request has ended. All of them have a budget, and who announces more
    than is left of it is told to come back later before the first byte is read.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, bodies: ByteBudget, count: Callable[[str], None]
    ) -> None:
        self._app = app
        self._limits = limits
        self._bodies = bodies
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        body = _Body(self._bodies, self._limits.max_body_bytes)
        try:
            body.expect(self._check_headers(scope))
        except MMServeError as error:
            self._count(error.code)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1009, "reason": ""})
            else:
                await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, body.counted(receive), send)
        finally:
            body.forget()

    def _check_headers(self, scope: Scope) -> int:
        """The bytes of body that are announced, 0 if none are."""
        limits, headers = self._limits, scope["headers"]
        if len(headers) > limits.max_headers:
            raise TooLarge(f"Expected at most {limits.max_headers} headers, but got {len(headers)}")
        total = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path") or b"")
        if total > limits.max_header_bytes:
            raise TooLarge(f"Expected at most {limits.max_header_bytes} bytes of headers, but got {total}")
        announced = 0
        for name, value in headers:
            # a length of more than 18 digits is above any limit
            if name == b"content-length" and (len(value) > 18 or int(value) > limits.max_body_bytes):
                raise TooLarge(f"Expected a body of at most {limits.max_body_bytes} bytes, but got more")
            if name == b"content-encoding" and value.lower() != b"identity":
                raise BadRequest("Expected a body without content encoding, but got it compressed")
            if name == b"content-length":
                announced = int(value)
        return announced


class _Body:
    """The part of the budget that one body has taken."""

    def __init__(self, budget: ByteBudget, max_bytes: int) -> None:
        self._budget = budget
        self._max_bytes = max_bytes
        self._taken = 0

    def expect(self, size: int) -> None:
        """Take room for a body of this size altogether."""
        if size > self._taken:
            self._budget.take(size - self._taken)
            self._taken = size

    def forget(self) -> None:
        self._budget.give(self._taken)
        self._taken = 0

    def counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise TooLarge(f"Expected a body of at most {self._max_bytes} bytes, but got more")
                self.expect(received)
            return message

        return counted


async def read_json(request: Request, max_depth: int) -> object:
    """The body as plain data; raises BadRequest before a parser could be hurt by it."""
    body = await request.body()
    check_structure(body, max_depth)
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("Expected a body of valid JSON in UTF-8, but got something else") from error


def check_structure(body: bytes, max_depth: int) -> None:
    """Bound nesting and the number of values of a JSON text, without parsing it."""
    depth = values = 0
    for match in _STRUCTURE.finditer(body):
        token = body[match.start()]
        if token in b"[{":
            depth += 1
            if depth > max_depth:
                raise BadRequest(f"Expected JSON nested at most {max_depth} deep, but got more")
        elif token in b"]}":
            depth -= 1
        if token != ord('"'):
            values += 1
            if values > MAX_JSON_VALUES:
                raise BadRequest(f"Expected JSON of at most {MAX_JSON_VALUES} values, but got more")
