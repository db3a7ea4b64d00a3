"""Logs: one line per record, the request's id in it, nothing private in it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from mmserve import log
from mmserve.errors import ConfigError


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.delenv("MMSERVE_LOG", raising=False)
    logger = logging.getLogger("mmserve")
    before = (list(logger.handlers), logger.level)
    stream = io.StringIO()
    log.setup_logging(stream=stream)
    yield stream
    logger.handlers[:], level = before
    logger.setLevel(level)


LOGGER = logging.getLogger("mmserve.test")


def test_a_record_is_one_line_of_fields(stream: io.StringIO) -> None:
    LOGGER.info("worker %s ready", "e0", extra={"role": "encode", "took_s": 0.5, "note": "two words"})
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.endswith(' info mmserve.test "worker e0 ready" role=encode took_s=0.5 note="two words"\n')
    assert line[10] == "T"
    assert line.split()[0].endswith("Z")


def test_records_carry_the_request_they_belong_to(stream: io.StringIO) -> None:
    with log.request_context("r1"):
        LOGGER.info("a")
        LOGGER.info("b", extra={"request_id": "r2"})
    LOGGER.info("c")
    a, b, c = stream.getvalue().splitlines()
    assert a.endswith("a request_id=r1")
    assert b.endswith("b request_id=r2")
    assert "request_id" not in c


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("GET https://host/clip.mp4?token=abc123&x=1", "abc123"),
        ("GET https://host/clip.mp4#abc123", "abc123"),
        ("GET https://user:abc123@host/clip.mp4", "abc123"),
        ("part data:image/png;base64,abc123", "abc123"),
        ("part data:,abc123", "abc123"),
        ("authorization: Bearer abc123", "abc123"),
        ("api_key=abc123", "abc123"),
        ('{"api-key": 1} password: abc123', "abc123"),
    ],
)
def test_private_text_is_hidden(stream: io.StringIO, text: str, private: str) -> None:
    LOGGER.info("got %s", text)
    LOGGER.info("got", extra={"detail": text})
    try:
        raise ValueError(text)
    except ValueError:
        LOGGER.exception("failed")
    assert private not in stream.getvalue()
    assert stream.getvalue().count("[hidden]") >= 3


@pytest.mark.parametrize(
    "name", ["prompt", "user_prompt", "api_key", "api_keys", "messages", "text", "image", "pixels"]
)
def test_private_fields_are_hidden_by_name(stream: io.StringIO, name: str) -> None:
    LOGGER.info("got", extra={name: "abc123"})
    assert stream.getvalue().endswith(f"got {name}=[hidden]\n")


def test_counts_of_private_things_are_shown(stream: io.StringIO) -> None:
    LOGGER.info("done", extra={"prompt_tokens": 12, "image_bytes": 34, "data": b"abc123"})
    assert stream.getvalue().endswith("done prompt_tokens=12 image_bytes=34 data=[hidden]\n")


def test_no_value_can_forge_a_line_or_a_field(stream: io.StringIO) -> None:
    LOGGER.info("a\n2026-01-01 fake", extra={"name_": 'x" y=1', "empty": "", "odd": "\u2028"})
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert '"a\\n2026-01-01 fake"' in line
    assert r'name_="x\" y=1" empty="" odd="\u2028"' in line


def test_a_long_value_is_cut(stream: io.StringIO) -> None:
    LOGGER.info("got", extra={"detail": "x" * 5000})
    assert len(stream.getvalue()) < 400


@pytest.mark.parametrize(
    ("argument", "variable", "shown"),
    [(None, None, 2), (None, "warning", 1), ("debug", "error", 3), ("ERROR", None, 0), (None, "", 2)],
)
def test_the_level_is_the_argument_or_the_environment(
    stream: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    variable: str | None,
    shown: int,
) -> None:
    if variable is not None:
        monkeypatch.setenv("MMSERVE_LOG", variable)
    log.setup_logging(argument, stream)
    LOGGER.debug("1")
    LOGGER.info("2")
    LOGGER.warning("3")
    assert len(stream.getvalue().splitlines()) == shown


def test_an_unknown_level_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="debug, info, warning, error, but got 'loud'"):
        log.setup_logging("loud")
