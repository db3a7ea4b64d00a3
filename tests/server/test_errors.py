"""Every way to be wrong gets its status, OpenAI's error shape, and no text but ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmserve.config import Limits, ServeConfig
from mmserve.server.schema import ChatRequest
from tests.server.fakes import VIDEO, FakePipeline, RunningServer, ask, running_server

LIMITS = Limits(max_body_bytes=100_000, max_images=2, max_parts=4, max_messages=3, max_tokens=100)
LEAKS = re.compile(
    r"0x[0-9a-f]{6,}|/work|/home|/usr|\.py|Traceback|pydantic|msgspec|starlette|jinja|PIL", re.I
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(ServeConfig(limits=LIMITS)) as running:
        yield running
        running.pipeline.wait_idle()
        assert running.fetcher.held == 0


def check(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not LEAKS.search(response.text), response.text
    for word in words:
        assert word in error["message"]
    return error


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    # body, param, words of the message
    ({"model": "other"}, "model", "'other'"),
    ({"messages": []}, "", "at least one message"),
    ({"messages": "hello"}, "messages", "Expected messages to be a list of messages, but got text"),
    ({"messages": [1]}, "", "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "", "messages[0].role"),
    ({"messages": [{"role": "user", "content": ""}]}, "", "empty"),
    ({"messages": [{"role": "user", "content": "x"}] * 4}, "", "at most 3 messages"),
    ({"messages": user(*[{"type": "text", "text": "x"}] * 5)}, "", "at most 4 parts"),
    ({"messages": user({"type": "input_audio"})}, "", "content[0].type"),
    ({"messages": user({"type": "image", "image": "/etc/passwd"})}, "", "content[0].type"),
    ({"messages": user(*[image("data:image/png;base64,AAAA")] * 3)}, "messages", "at most 2 media items"),
    ({"messages": user(image(7))}, "", "image_url.url"),
    ({"temperature": "hot"}, "temperature", "Expected temperature to be a number, but got text"),
    ({"temperature": -1}, "", "temperature of 0 to 10"),
    ({"top_p": 0}, "", "top_p"),
    ({"max_tokens": 0}, "max_tokens", "1 to 100"),
    ({"max_tokens": 101}, "max_tokens", "1 to 100"),
    ({"max_completion_tokens": 2**63}, "max_completion_tokens", "1 to 100"),
    ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
    ({"max_tokens": True}, "max_tokens", "a whole number, but got true or false"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"stop": 1}, "stop", "text or a list of texts"),
    ({"stop": ["a", 1]}, "stop", "text or a list of texts"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"seed": -1}, "", "seed"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs to be true"),
    ({"logprobs": True, "top_logprobs": 21}, "", "logprobs of 0 to 20"),
    ({"n": 2}, "", "Expected n of 1 with temperature 0"),
    ({"tools": [{"type": "function"}]}, "tools", "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
    ({"priority": 10**9}, "priority", "priority of 0 to 1000000"),
    ({"presence_penalty": 2.5}, "", "presence_penalty of -2 to 2"),
    ({"temprature": 0.5}, "temprature", "the nearest is 'temperature'"),
    ({"chat_template": "{{ x }}"}, "chat_template", "known field"),
    ({"mmserve": 1}, "mmserve", "an object"),
    ({"mmserve": {"prune": "magic"}}, "", "none, random, uniform, holitom"),
    ({"mmserve": {"kv": "magic"}}, "", "snapkv"),
    ({"mmserve": {"attention": "magic"}}, "", "dense"),
    ({"mmserve": {"kv_dtype": "int1"}}, "", "auto"),
    ({"mmserve": {"kv_dtype": "int8"}}, "", "kv_dtype auto, since that is how this deployment keeps KV"),
    ({"mmserve": {"attention": "a_shape", "prune": "carriers"}}, "", "attention dense with prune carriers"),
    ({"mmserve": {"attention_options": {"sink": 4}}}, "", "attention_options only with attention"),
    ({"mmserve": {"attention_dense_below": 0}}, "", "with a sparse attention, but got 0 with dense"),
    ({"mmserve": {"attention_profile": "/etc/passwd"}}, "mmserve.attention_profile", "a known field"),
    ({"mmserve": {"keep": 0}}, "", "keep of above 0"),
    ({"mmserve": {"keep": 1.5}}, "", "keep of above 0"),
    ({"mmserve": {"kv_budget": -1}}, "", "kv_budget"),
    ({"mmserve": {"kepp": 0.5}}, "mmserve.kepp", "the nearest is 'keep'"),
    ({"mmserve": {"num_frames": 4, "fps": 1}}, "mmserve", "at most one"),
    ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video", "1 to 2048"),
    ({"media_io_kwargs": {"video": {"fps": 0}}}, "media_io_kwargs.video", "fps of above 0"),
    ({"media_io_kwargs": {"video": {"start": 2, "end": 2}}}, "media_io_kwargs.video", "an end after it"),
    ({"mmserve": {"start": -1}}, "mmserve", "start of 0 or later"),
    ({"mmserve": {"max_pixels": 0}}, "mmserve", "max_pixels of 1 or more"),
    ({"media_io_kwargs": {"video": {"backend": "x"}}}, "media_io_kwargs.video.backend", "known field"),
    ({"cache_salt": ""}, "cache_salt", "not empty"),
]


@pytest.mark.parametrize(
    ("body", "param", "words"), BAD_BODIES, ids=[str(case[0])[:50] for case in BAD_BODIES]
)
def test_a_wrong_body_is_explained(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    status = 404 if "model" in body else 400
    error = check(ask(server, **body), status, words)
    assert (error["param"] or "") == param
    assert error["type"] == "invalid_request_error"


def test_a_wrong_model_has_the_code_clients_look_for(server: RunningServer) -> None:
    assert check(ask(server, model="other"), 404)["code"] == "model_not_found"


def test_a_field_that_is_null_counts_as_left_out(server: RunningServer) -> None:
    names = ("n", "tools", "stop", "temperature", "mmserve", "logprobs", "whatever")
    assert ask(server, **dict.fromkeys(names)).status_code == 200


@pytest.mark.parametrize(
    ("url", "status"),
    [("ftp://example.org/a.png", 422), ("http://10.0.0.1/a.png", 403), ("https://example.org/a.png", 422)],
)
def test_what_cannot_be_fetched_is_refused_with_the_fetchers_words(
    server: RunningServer, url: str, status: int
) -> None:
    check(ask(server, messages=user(image(url)), stream=True), status, "media")


def test_one_bad_item_lets_go_of_the_good_one(server: RunningServer) -> None:
    parts = (image("data:image/png;base64,AAAA"), image("ftp://x/y"))
    check(ask(server, messages=user(*parts)), 422)
    assert server.fetcher.held == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": "\xff"}',
        b'"' + b'\\"' * 40_000,
        b"[" * 50_000,
        b'{"a":' * 33 + b"1" + b"}" * 33,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_not_a_json_object_is_refused(server: RunningServer, body: bytes) -> None:
    check(post(server, body), 400)


def post(
    server: RunningServer, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=10, trust_env=False)


def test_a_large_body_is_refused_before_it_is_read(server: RunningServer) -> None:
    check(post(server, b" " * 100_001), 413, "100000 bytes")
    # two bytes of it are for brackets
    check(post(server, b"[" + b" " * 99_998 + b"]"), 400, "an object")


def test_a_large_body_without_a_length_is_refused_while_it_arrives(server: RunningServer) -> None:
    parts = (b" " * 10_000 for _ in range(11))
    response = server.http.post("/v1/chat/completions", content=parts)
    check(response, 413, "100000 bytes")


def test_many_or_long_headers_are_refused(server: RunningServer) -> None:
    check(post(server, b"{}", **{f"x-{index}": "1" for index in range(101)}), 413, "100 headers")
    check(post(server, b"{}", **{"x-long": "a" * 16_384}), 413, "bytes of headers")


def test_many_small_values_are_refused(server: RunningServer) -> None:
    with running_server() as large:
        check(post(large, b"[" + b"0," * 200_000 + b"0]"), 400, "200000 values")


def test_unknown_routes_and_methods_have_the_same_shape(server: RunningServer) -> None:
    check(server.http.get("/nothing"), 404)
    check(server.http.get("/v1/chat/completions"), 405)
    check(server.http.get("/v1/models/other"), 404, "'other'")


def test_overload_says_when_to_come_back() -> None:
    pipeline = FakePipeline(max_active=1)
    with running_server(pipeline=pipeline) as server:
        pipeline.admit(lambda _: None)
        response = ask(server, messages=VIDEO, stream=True)
        error = check(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert not server.fetcher.is_waiting.is_set(), "media was fetched before admission"


def test_an_unexpected_failure_tells_nothing() -> None:
    with running_server() as server:
        server.pipeline.submit = None  # type: ignore[assignment]  # any bug will do
        error = check(ask(server), 500, "unexpected")
        assert error["code"] == "internal_error"
        server.pipeline.wait_idle()


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": 1}, "text"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "'other'"),
        ("/detokenize", {}, "a list of token ids"),
        ("/detokenize", {"tokens": [-1]}, "token ids from 0"),
        ("/detokenize", {"tokens": [2**40]}, "token ids from 0"),
    ],
)
def test_wrong_token_requests_are_explained(
    server: RunningServer, path: str, body: dict[str, Any], words: str
) -> None:
    check(post(server, json.dumps(body).encode(), path), 404 if "model" in body else 400, words)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*ChatRequest.model_fields, "n", "tools", "user"])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(names, json_values, max_size=4), has_question=st.booleans())
def test_no_body_makes_the_server_fail(
    server: RunningServer, body: dict[str, Any], has_question: bool
) -> None:
    if has_question:
        body["messages"] = [{"role": "user", "content": "What moves?"}]
    response = post(server, json.dumps(body).encode())
    assert response.status_code < 500
    if response.status_code >= 400:
        check(response, response.status_code)
