"""`mmserve serve` as a user starts it: real processes, the openai client, and nothing left behind."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from PIL import Image

from mmserve.evaluation.suites import Example

START_S = 120.0


@dataclass
class Server:
    process: subprocess.Popen[str]
    client: openai.OpenAI
    url: str


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, "-m", "mmserve", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url: list[str] = []
        listening = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"url=(http://\S+)", line):
                    url.append(found[1])
                    listening.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert listening.wait(START_S), "the server does not listen"
        client = openai.OpenAI(base_url=f"{url[0]}/v1", api_key="unused", max_retries=0)
        _wait_ready(url[0])
        yield Server(process, client, url[0])
        if process.poll() is None:
            process.kill()
        reader.join(10)


def _wait_ready(url: str) -> None:
    import httpx

    pause = threading.Event()
    for _ in range(int(START_S * 10)):
        if httpx.get(f"{url}/readyz").status_code == 200:
            return
        pause.wait(0.1)
    raise AssertionError("the server is not ready")


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _about(clip: Path, question: str) -> list[Any]:
    url = _data_url("video/mp4", clip.read_bytes())
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_a_clip_is_answered_as_a_stream_and_the_second_question_is_cached(
    server: Server, basic_clips: list[tuple[Path, Example]]
) -> None:
    clip, example = basic_clips[0]
    stream = server.client.chat.completions.create(
        model="tiny", messages=_about(clip, example.question.text), stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.strip()
    again = server.client.chat.completions.create(
        model="tiny",
        messages=_about(clip, "How many objects are there?"),
        extra_body={"mmserve": {"report": True}},
    )
    assert again.usage is not None
    report = again.usage.model_dump()["mmserve"]
    assert report["usage"]["visual_tokens_cached"] == 8 * 36
    assert report["timings_ms"]["encode"] == 0


def test_bad_requests_get_a_clear_4xx_and_the_server_goes_on(
    server: Server, basic_clips: list[tuple[Path, Example]]
) -> None:
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")

    def image(url: str) -> list[Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        return [{"role": "user", "content": parts}]

    cases: list[tuple[str, Any, int]] = [
        ("nope", [{"role": "user", "content": "hi"}], 404),
        ("tiny", image("https://127.0.0.1/secret.png"), 403),
        ("tiny", image("ftp://example.org/x.png"), 400),
        ("tiny", image("not a url"), 400),
        ("tiny", [{"role": "user", "content": ""}], 400),
        ("tiny", [], 400),
        ("tiny", image(_data_url("image/png", pixel.getvalue())), 422),
    ]
    for model, messages, status in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            server.client.chat.completions.create(model=model, messages=messages)
        assert caught.value.status_code == status, caught.value.message
        assert "Traceback" not in caught.value.message
    clip, example = basic_clips[0]
    answer = server.client.chat.completions.create(model="tiny", messages=_about(clip, example.question.text))
    assert answer.choices[0].message.content


def test_only_the_api_listens_and_only_on_loopback(server: Server) -> None:
    family = [
        psutil.Process(server.process.pid),
        *psutil.Process(server.process.pid).children(recursive=True),
    ]
    listening = [
        connection.laddr
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]


def test_sigterm_ends_every_process_with_status_0(server: Server) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 5  # api, three workers, a decode sandbox
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
