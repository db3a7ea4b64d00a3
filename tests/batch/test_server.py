"""Asking a server: data URLs, our report in its usage, waiting when told to, errors as they were meant."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmserve.batch.answerers import RETRIES, Answer, ServerAnswerer, extensions
from mmserve.batch.questions import Question
from mmserve.batch.runner import answer_all
from mmserve.errors import MediaError, Overloaded, Unauthorized, Unavailable
from mmserve.request import MediaOptions, Methods
from mmserve.sampling import SamplingParams

Handler = Callable[[httpx.Request], httpx.Response]
OK: dict[str, Any] = {
    "choices": [{"message": {"content": "red"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


def asked(*content: dict[str, Any], **more: Any) -> Question:  # noqa: ANN401
    messages = ({"role": "user", "content": [*content, {"type": "text", "text": "What?"}]},)
    return Question(question_id="q", line=1, messages=messages, sampling=SamplingParams(max_tokens=9), **more)


def ask(
    handler: Handler,
    question: Question | None = None,
    waits: list[float] | None = None,
    **more: Any,  # noqa: ANN401
) -> Answer:
    def route(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        assert request.url.path == "/v1/chat/completions"
        return handler(request)

    server = ServerAnswerer(
        "http://server/v1/",
        transport=httpx.MockTransport(route),
        sleep=(waits if waits is not None else []).append,
        **more,
    )
    try:
        ((_, answer),) = answer_all([question or asked()], server, concurrency=2)
    finally:
        server.close()
    return answer


def test_files_travel_as_data_urls(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"frames")
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret"
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=OK)

    parts: list[dict[str, Any]] = [
        {"type": "video", "video": str(clip)},
        {"type": "image_url", "image_url": {"url": "https://h/a.png"}},
    ]
    fields = extensions(Methods(prune="holitom", keep=0.5))
    options = MediaOptions(num_frames=4)
    answer = ask(handler, asked(*parts), api_key="secret", options=options, extensions=fields)
    assert answer.error is None
    assert (answer.text, answer.finish_reason, answer.usage["prompt_tokens"]) == ("red", "stop", 3)
    (body,) = bodies
    encoded = base64.b64encode(b"frames").decode()
    assert body["model"] == "served"
    assert body["max_tokens"] == 9
    assert body["mmserve"] == {"report": True, "prune": "holitom", "keep": 0.5}
    assert body["media_io_kwargs"] == {"video": {"num_frames": 4}}
    content = body["messages"][0]["content"]
    assert content[0] == {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded}"}}
    assert content[1] == parts[1]


def test_the_servers_report_is_the_rows(tmp_path: Path) -> None:
    report = {"usage": {"visual_tokens": 8}, "timings_ms": {"total": 3.0}, "methods": {"prune": "none"}}
    reply = {**OK, "usage": {"prompt_tokens": 3, "mmserve": report}}
    answer = ask(lambda _: httpx.Response(200, json=reply))
    assert answer.usage == {"visual_tokens": 8}
    assert answer.timings_ms == {"total": 3.0}
    assert answer.methods == {"prune": "none"}


def test_an_openai_body_is_sent_as_it_is() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=OK)

    ask(handler, asked(body={"temperature": 0.7, "model": "other"}))
    assert bodies[0]["temperature"] == 0.7
    assert "max_tokens" not in bodies[0]


def test_a_full_server_is_asked_again_when_it_says() -> None:
    replies = [
        httpx.Response(429, headers={"retry-after": "3"}),
        httpx.Response(503),
        httpx.Response(200, json=OK),
    ]
    waits: list[float] = []
    answer = ask(lambda _: replies.pop(0), waits=waits)
    assert answer.text == "red"
    assert waits == [3.0, 2.0]


def test_a_server_that_stays_full_is_an_error() -> None:
    waits: list[float] = []
    error = {"error": {"code": "overloaded", "message": "full"}}
    answer = ask(lambda _: httpx.Response(429, json=error), waits=waits)
    assert isinstance(answer.error, Overloaded)
    assert len(waits) == RETRIES


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (
            httpx.Response(422, json={"error": {"code": "media_error", "message": "broken"}}),
            MediaError,
            "broken",
        ),
        (
            httpx.Response(401, json={"error": {"code": "unauthorized", "message": "key"}}),
            Unauthorized,
            "key",
        ),
        (httpx.Response(500, text="<html>"), Exception, "status 500"),
        (httpx.Response(500, json=[1]), Exception, "status 500"),
        (httpx.Response(200, text="<html>"), Exception, "exchange failed"),
        (httpx.Response(200, json={"choices": []}), Exception, "exchange failed"),
    ],
)
def test_errors_of_a_server(reply: httpx.Response, kind: type[Exception], message: str) -> None:
    answer = ask(lambda _: reply)
    assert isinstance(answer.error, kind)
    assert message in answer.error.public_message


def test_a_broken_connection_is_an_error_of_that_row() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    assert isinstance(ask(handler).error, Unavailable)


def test_a_row_says_how_its_media_are_sampled() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=OK)

    every = MediaOptions(num_frames=4, max_pixels=1000)
    ask(handler, asked(span=(1.0, 2.5)), options=every)
    ask(handler, asked(media_io={"video": {"fps": 2}}), options=every)
    ask(handler, asked())
    assert bodies[0]["media_io_kwargs"]["video"] == {
        "num_frames": 4,
        "max_pixels": 1000,
        "start": 1.0,
        "end": 2.5,
    }
    assert bodies[1]["media_io_kwargs"]["video"] == {"fps": 2.0, "max_pixels": 1000}
    assert "media_io_kwargs" not in bodies[2]


def test_frames_and_names_travel_too(tmp_path: Path) -> None:
    frame = tmp_path / "a.png"
    frame.write_bytes(b"pixels")
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": [str(frame), "https://h/b.png"], "fps": 2.0, "uuid": "clip"},
        {"type": "image", "image": str(frame), "uuid": "one"},
        {"type": "image", "image": None, "uuid": "one"},
    ]
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=OK)

    ask(handler, asked(*parts))
    url = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
    assert bodies[0]["messages"][0]["content"][:3] == [
        {"type": "video", "video": [url, "https://h/b.png"], "fps": 2.0, "uuid": "clip"},
        {"type": "image_url", "image_url": {"url": url}, "uuid": "one"},
        {"type": "image_url", "image_url": {"url": None}, "uuid": "one"},
    ]


@pytest.mark.parametrize("url", ["http://server", "not a url", "http://[bad"])
def test_no_server_is_one_clear_error(url: str) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(Unavailable, match="Expected a server at"):
        ServerAnswerer(url, transport=httpx.MockTransport(refuse))


def test_a_server_that_wants_a_key_says_so() -> None:
    reply = httpx.Response(401, json={"error": {"code": "unauthorized", "message": "a key is needed"}})
    with pytest.raises(Unauthorized, match="a key is needed"):
        ServerAnswerer("http://server", transport=httpx.MockTransport(lambda _: reply))


def test_only_changes_are_sent() -> None:
    assert extensions(Methods()) == {"mmserve": {"report": True}}
