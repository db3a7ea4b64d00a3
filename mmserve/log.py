"""Structured logs on stderr: one line per record, `key=value`, with the request's id.

Modules log through `logging.getLogger(__name__)` and put values in `extra`. What may be private is
hidden here, whoever logs it: media, prompts, keys and the query of a URL. Knows no other module.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from mmserve.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
MAX_VALUE_CHARS = 200

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

# an extra with one of these words in its name is never written
_PRIVATE_NAME = re.compile(
    r"(^|_)(api_?keys?|keys|authorization|bearer|body|content|cookie|headers|image|media|messages|password|"
    r"pixels|prompt|question|secret|text|token|video)($|_)"
)
_REDACTIONS = (
    (re.compile(r"\bdata:[\w.+-]*(/[\w.+-]+)?[;,]\S*"), "data:[hidden]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), r"\1 [hidden]"),
    (re.compile(r"(?i)\b(api[_-]?key|password|secret|token)(\s*[=:]\s*)[^\s&,;]+"), r"\1\2[hidden]"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]*@"), r"\1[hidden]@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#]*)[?#][^\s\"']*"), r"\1?[hidden]"),
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(level: str | None = None, stream: TextIO | None = None) -> None:
    """Send mmserve's records to stderr; the level is the argument, else $MMSERVE_LOG, else info."""
    name = (level or os.environ.get("MMSERVE_LOG") or "info").lower()
    if name not in LEVELS:
        raise ConfigError(f"Expected a log level of {', '.join(LEVELS)}, but got {name!r}")
    logger = logging.getLogger("mmserve")
    for handler in [old for old in logger.handlers if isinstance(old.formatter, LineFormatter)]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(name.upper())


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Every record written inside carries this request's id, also across `await`."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def redact(text: str) -> str:
    """`text` without URL queries, credentials and inline media."""
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    return text


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z info mmserve.queues "worker ready" request_id=… role=encode`."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        request_id = extras.pop("request_id", _request_id.get())
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        parts = [f"{moment}Z", record.levelname.lower(), record.name, _quoted(record.getMessage())]
        if request_id is not None:
            parts.append(f"request_id={_quoted(str(request_id))}")
        parts += [f"{name}={_shown(name, value)}" for name, value in extras.items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + redact(self.formatException(record.exc_info))
        return line


def _shown(name: str, value: object) -> str:
    if isinstance(value, bool | int | float) or value is None:
        return str(value)
    if _PRIVATE_NAME.search(name.lower()) or isinstance(value, bytes | bytearray | memoryview):
        return "[hidden]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """One safe word: quoted when needed, so that no value can forge a line or a field."""
    text = redact(text)
    if len(text) > MAX_VALUE_CHARS:
        text = text[: MAX_VALUE_CHARS - 1] + "…"
    plain = text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\')
    return text if plain else json.dumps(text)
