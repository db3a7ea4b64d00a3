"""Errors as OpenAI's clients expect them, always in our own words.

Knows nothing about routes.
"""

from __future__ import annotations

import http
import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from mmserve.errors import BadRequest, MMServeError, NotFound, Overloaded

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class FieldError(BadRequest):
    """One field of the body is wrong; `param` is its path."""

    def __init__(self, param: str, public_message: str) -> None:
        super().__init__(public_message)
        self.param = param


class ModelNotFound(NotFound):
    code = "model_not_found"
    param = "model"


def error_body(error: MMServeError) -> dict[str, Any]:
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.public_message,
            "type": _TYPES.get(error.status, fallback),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def error_response(error: MMServeError) -> Response:
    headers = {}
    if error.retryable:
        headers["Retry-After"] = str(error.retry_after_s if isinstance(error, Overloaded) else 1)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), status=error.status, headers=headers)


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json"
    )


def install_error_handlers(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, MMServeError)
        return error_response(error)

    async def routing(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = MMServeError(
            f"{http.HTTPStatus(error.status_code).phrase}: see /openapi.json for what exists"
        )
        known.status = error.status_code
        known.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        response = error_response(known)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response

    async def unexpected(_: Request, error: Exception) -> Response:
        # the server logs the exception itself
        return error_response(MMServeError("The server failed in an unexpected way"))

    app.add_exception_handler(MMServeError, ours)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unexpected)
