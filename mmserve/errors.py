"""Every error a caller can see: one tree, each class with its HTTP status and whether a retry can help.

Messages are written here or at the raising site in our own words; a library's text never passes.
"""

from __future__ import annotations


class MMServeError(Exception):
    """Base class. `public_message` may be shown to any client; `code` is stable for programs."""

    status = 500
    code = "internal_error"
    retryable = False

    def __init__(self, public_message: str) -> None:
        super().__init__(public_message)
        self.public_message = public_message


class BadRequest(MMServeError):
    """The request itself is wrong: expected and found values are in the message."""

    status = 400
    code = "bad_request"


class Unauthorized(MMServeError):
    status = 401
    code = "unauthorized"


class Forbidden(MMServeError):
    """Policy forbids it: a private address, a path outside the allowed root."""

    status = 403
    code = "forbidden"


class NotFound(MMServeError):
    status = 404
    code = "not_found"


class MediaNotFound(MMServeError):
    """Media was named that is not remembered here, or not any more: send it again."""

    status = 409
    code = "media_not_found"


class TooLarge(MMServeError):
    status = 413
    code = "too_large"


class MediaError(MMServeError):
    """The media was fetched but cannot be used: broken, empty, unsupported or over a limit."""

    status = 422
    code = "media_error"


class Overloaded(MMServeError):
    """Admission limits are reached; try again after `retry_after_s`."""

    status = 429
    code = "overloaded"
    retryable = True
    retry_after_s = 1


class RequestPoisoned(MMServeError):
    """The request killed a worker twice, the second time alone; it is not tried again."""

    code = "request_poisoned"


class Unavailable(MMServeError):
    """A stage has no live worker, or the server is shutting down."""

    status = 503
    code = "unavailable"
    retryable = True


class DeadlineExceeded(MMServeError):
    status = 504
    code = "deadline_exceeded"
    retryable = True


class ConfigError(MMServeError):
    """A deployment setting is wrong; start-up stops."""

    code = "config_error"


class WireError(MMServeError):
    """A frame or lease from another process is malformed; it is dropped, counted, never trusted."""

    code = "wire_error"


ERRORS: dict[str, type[MMServeError]] = {
    cls.code: cls
    for cls in (
        MMServeError,
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MediaNotFound,
        TooLarge,
        MediaError,
        Overloaded,
        RequestPoisoned,
        Unavailable,
        DeadlineExceeded,
        ConfigError,
        WireError,
    )
}


def from_code(code: str, public_message: str) -> MMServeError:
    """Rebuild an error that crossed a process border."""
    return ERRORS.get(code, MMServeError)(public_message)
