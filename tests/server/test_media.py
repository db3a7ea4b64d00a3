"""Media as HTTP clients send them: frames, names of media sent before, too much at once (R12, R17, R30)."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from mmserve.config import CacheSizes, Limits, ServeConfig
from mmserve.errors import ConfigError
from mmserve.media.fetch import Fetcher, FetchPolicy
from mmserve.media.framelist import SUFFIX
from mmserve.media.intake import Intake
from mmserve.media.limits import MediaLimits
from tests.media.web import leftovers
from tests.server.fakes import FakeFetcher, FakePipeline, RunningServer, ask, wait_until

PICTURE = "data:image/png;base64," + base64.b64encode(b"a picture").decode()
SMALL = Limits(
    max_body_bytes=6000, max_image_bytes=4000, max_video_bytes=4000, max_media_bytes=8000, max_frames=50
)


@contextmanager
def serving(
    folder: Path, limits: Limits | None = None, *, keys: tuple[str, ...] | None = None
) -> Iterator[RunningServer]:
    """The API with media that are really fetched, and a pipeline that is not one."""
    limits = limits or Limits()
    config = ServeConfig(limits=limits, api_key=keys, cache=CacheSizes(remembered_media_bytes=1 << 20))
    fetcher = Fetcher(
        FetchPolicy(), MediaLimits.from_config(limits), folder, max_held_bytes=limits.max_media_bytes
    )
    intake = Intake(fetcher, config.cache.remembered_media_bytes)
    server = RunningServer(FakePipeline(), cast(FakeFetcher, intake), config)
    server.start()
    try:
        yield server
        wait_until(lambda: fetcher.store.held_bytes == 0)
    finally:
        server.stop()


def about(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What moves?"}]}]


def image(uuid: str | None = None, url: str | None = PICTURE) -> dict[str, Any]:
    named = {} if uuid is None else {"uuid": uuid}
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **named}


def test_frames_become_one_video(tmp_path: Path) -> None:
    jpegs = "data:video/jpeg;base64,YWFh,YmJi"
    with serving(tmp_path) as server:
        for part in (
            {"type": "video_url", "video_url": {"url": jpegs}},
            {"type": "video", "video": [PICTURE, PICTURE], "fps": 5},
        ):
            assert ask(server, messages=about(part)).status_code == 200
        kwargs = {"video": {"fps": 4.0}}
        part = {"type": "video_url", "video_url": {"url": jpegs}}
        assert ask(server, messages=about(part), media_io_kwargs=kwargs).status_code == 200
        media = [ref for prompt in server.pipeline.prompts for ref in prompt.media]
    assert [ref.modality for ref in media] == ["video"] * 3
    assert all(ref.path.endswith(SUFFIX) for ref in media)
    assert [(ref.source, ref.array_fps) for ref in media] == [
        ("data:video/jpeg", 2.0),
        ("frames", 5.0),
        ("data:video/jpeg", 4.0),
    ]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("part", "status"),
    [
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + "YQ==," * 999}}, 422),
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,YQ==,!"}}, 400),
        ({"type": "video", "video": [PICTURE] * 51}, 400),
        ({"type": "video", "video": "/etc/passwd"}, 400),
        ({"type": "video", "video": ["/etc/passwd"]}, 400),
        ({"type": "video", "video": ["file:///etc/passwd"]}, 403),
        ({"type": "image", "image": PICTURE}, 400),
    ],
)
def test_wrong_frames_are_refused_quickly(tmp_path: Path, part: dict[str, Any], status: int) -> None:
    with serving(tmp_path, SMALL) as server:
        ask(server)
        began = time.perf_counter()
        response = ask(server, messages=about(part))
        assert (response.status_code, time.perf_counter() - began < 1.0) == (status, True), response.text
        assert "passwd" not in response.text
    assert leftovers(tmp_path) == []


def test_media_sent_before_are_found_by_their_name(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert ask(server, messages=about(image("one"))).status_code == 200
        assert ask(server, messages=about(image("one", None))).status_code == 200
        # in one request, whatever comes first
        both = about(image("two", None), image("two"))
        assert ask(server, messages=both).status_code == 200
        digests = {ref.digest for prompt in server.pipeline.prompts for ref in prompt.media}
        assert len(digests) == 1


def test_an_unknown_name_asks_for_the_media(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        response = ask(server, messages=about(image("lost", None)))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (409, "media_not_found")
        assert "'lost'" in error["message"]
        assert "send it again" in error["message"]
        # an image is no video
        ask(server, messages=about(image("lost")))
        video = {"type": "video_url", "video_url": None, "uuid": "lost"}
        assert ask(server, messages=about(video)).status_code == 409
        assert ask(server, messages=about(image("lost", None))).status_code == 200


def test_a_name_is_its_tenants(tmp_path: Path) -> None:
    with serving(tmp_path, keys=("first", "second")) as server:
        sent, named = about(image("one")), about(image("one", None))
        assert ask(server, key="first", messages=sent).status_code == 200
        assert ask(server, key="first", messages=named).status_code == 200
        assert ask(server, key="second", messages=named).status_code == 409
        assert ask(server, key="first", messages=named, cache_salt="x").status_code == 409


def large(number: int, size: int) -> str:
    return "data:image/png;base64," + base64.b64encode(b"%04d" % number + bytes(size)).decode()


def check_overloaded(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1


def test_more_media_than_there_is_room_for_come_back_later(tmp_path: Path) -> None:
    limits = Limits(max_body_bytes=8000, max_image_bytes=4000, max_video_bytes=4000, max_media_bytes=8000)
    with serving(tmp_path, limits) as server:
        # files and bodies have a budget each: these are remembered, so that requests for them are short
        for number in range(3):
            assert ask(server, messages=about(image(str(number), large(number, 3000)))).status_code == 200
        server.pipeline.gate.clear()
        with ThreadPoolExecutor() as threads:
            running = [
                threads.submit(ask, server, messages=about(image(str(number), None))) for number in range(2)
            ]
            wait_until(lambda: len(server.pipeline.records) == 2 and len(server.pipeline.prompts) == 5)
            check_overloaded(ask(server, messages=about(image("2", None))))
            server.pipeline.gate.set()
            assert [request.result().status_code for request in running] == [200, 200]
        assert ask(server, messages=about(image("2", None))).status_code == 200


def test_bodies_have_a_budget_and_are_not_read_beyond_it(tmp_path: Path) -> None:
    with serving(tmp_path, SMALL) as server:
        server.pipeline.gate.clear()
        with ThreadPoolExecutor() as threads:
            running = threads.submit(ask, server, messages=about(image(None, large(0, 3000))))
            wait_until(server.pipeline.started.is_set)
            # the body itself is never sent
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
                )
                answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in answer.lower()
            # nor does one without a length get further
            response = httpx.post(
                f"{server.url}/v1/chat/completions", content=iter([b" " * 2500] * 2), trust_env=False
            )
            check_overloaded(response)
            assert ask(server, max_tokens=1).status_code == 200
            server.pipeline.gate.set()
            assert running.result().status_code == 200
        assert ask(server, messages=about(image(None, large(1, 3000)))).status_code == 200


def test_many_clients_at_once_hold_no_more_than_the_budget(tmp_path: Path) -> None:
    """R30 in small: those that are let in are answered, the others told at once."""
    held: list[int] = []
    limits = Limits(max_body_bytes=8000, max_image_bytes=4000, max_video_bytes=4000, max_media_bytes=12_000)
    with serving(tmp_path, limits) as server:
        store = cast(Intake, server.fetcher)._store
        is_done = threading.Event()

        def watch() -> None:
            while not is_done.wait(0.001):
                held.append(store.held_bytes)

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(24) as threads:
            asked = [
                threads.submit(ask, server, messages=about(image(None, large(number, 3000))), max_tokens=2)
                for number in range(48)
            ]
            statuses = [request.result().status_code for request in asked]
        is_done.set()
        watching.join()
    assert set(statuses) <= {200, 429}
    assert 200 in statuses
    assert max(held) <= 12_000
    assert leftovers(tmp_path) == []


def test_a_budget_below_one_item_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="max_media_bytes"):
        Limits(max_media_bytes=99_999_999)
