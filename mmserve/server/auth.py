"""Asks for an API key before anything else is looked at, for HTTP and WebSocket alike.

Denies by default: only the two probes are open. Knows nothing about what lies behind.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mmserve.errors import Unauthorized
from mmserve.server.errors import error_response

OPEN_PATHS = frozenset({"/livez", "/readyz"})
_POLICY_VIOLATION = 1008


class ApiKeyMiddleware:
    """Lets a request pass whose bearer key is one of `keys`, and names its tenant in the scope's state."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # lifespan comes from the server itself; every other type, also an unknown one, needs the key
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is not None:
            scope.setdefault("state", {})["tenant"] = tenant
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ""})
        else:
            error = Unauthorized("Expected the header 'Authorization: Bearer KEY' with a valid key")
            await error_response(error)(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = _digest(key.strip().encode("latin-1"))
        # every digest is compared, so that time tells nothing
        matches = [known for known in self._digests if hmac.compare_digest(known, given)]
        return matches[0].hex() if matches else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
