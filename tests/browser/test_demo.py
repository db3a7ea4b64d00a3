"""The demo page in a real browser against the real HTTP front door with a stand-in behind it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from demo.page import build_page, launch
from mmserve.errors import MediaError
from tests.server.fakes import ANSWER, RunningServer, running_server, wait_until

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
# a folder for pictures of every state, for people to look at
SHOTS = os.environ.get("MMSERVE_SHOTS")


def write_clip(path: Path) -> None:
    """A red square that moves to the right for two seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 256, 192, "yuv420p"
        for index in range(16):
            frame = np.full((192, 256, 3), (24, 32, 48), dtype=np.uint8)
            left = 12 * index
            frame[70:120, left : left + 50] = (220, 60, 50)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "red_square.mp4")
    shutil.copy(folder / "red_square.mp4", folder / "second_clip.mp4")
    (folder / "questions.jsonl").write_text(
        '{"id": "1", "video": "red_square.mp4", "question": "Where does the square go?", "answer": "right"}\n'
        '{"id": "2", "video": "red_square.mp4", "question": "Which colour is it?"}\n'
        '{"id": "3", "video": "second_clip.mp4", "question": "And in the second clip?"}\n'
    )
    return folder


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    yield shared
    pipeline, fetcher = shared.pipeline, shared.fetcher
    pipeline.gate.set()
    fetcher.gate.set()
    pipeline.error, pipeline.is_ready = None, True
    pipeline.wait_idle()
    pipeline.cancelled.clear()
    pipeline.prompts.clear()
    fetcher.is_waiting.clear()


@pytest.fixture(scope="module")
def address(shared: RunningServer, clips: Path) -> Iterator[str]:
    page = build_page(shared.url, clips=clips)
    yield launch(page, wait=False)
    page.close(verbose=False)


# not for the session: while Playwright runs, this thread cannot run an event loop of its own
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture(params=["desktop"])
def page(request: pytest.FixtureRequest, browser: Any, server: RunningServer, address: str) -> Iterator[Any]:  # noqa: ANN401
    sizes = {"desktop": (1280, 900), "phone": (390, 844)}
    width, height = sizes[request.param.removesuffix("-dark")]
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.goto(address + ("?__theme=dark" if request.param.endswith("-dark") else "?__theme=light"))
    opened.get_by_text("tiny", exact=True).wait_for()
    yield opened
    opened.close()


def shoot(page: Any, name: str) -> None:  # noqa: ANN401
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(600)  # until pictures and animations are there
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def ask(page: Any, question: str = "Where does the square go?") -> None:  # noqa: ANN401
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


@pytest.mark.parametrize("page", ["desktop", "desktop-dark", "phone", "phone-dark"], indirect=True)
def test_a_question_about_a_bundled_clip_streams_its_answer(
    page: Any,  # noqa: ANN401
    server: RunningServer,
    request: pytest.FixtureRequest,
) -> None:
    look = request.node.callspec.params["page"]
    shoot(page, f"{look}-empty")
    server.pipeline.gate.clear()
    ask(page)
    # the first token is there while the others are held back
    page.locator("#answer .is-busy .mm-text").filter(has_text="red").wait_for()
    assert page.locator("#stop").is_visible()
    assert not page.locator("#ask").is_visible()
    shoot(page, f"{look}-busy")
    server.pipeline.gate.set()
    page.locator("#answer .is-done").filter(has_text=ANSWER).wait_for()
    page.locator("#answer").get_by_text("Expected: right").wait_for()
    page.locator("#report").get_by_text("20 → 5").wait_for()
    assert page.locator("#ask").is_visible()
    shoot(page, f"{look}-done")
    (prompt,) = server.pipeline.prompts
    assert prompt.media[0].modality == "video"
    assert prompt.media[0].options.num_frames == 16
    assert prompt.methods.prune == "none"
    # nothing is wider than the window
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_stop_frees_the_request(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    server.pipeline.gate.clear()
    ask(page)
    page.locator("#answer .is-busy .mm-text").wait_for()
    page.locator("#stop").click()
    page.locator("#answer .is-done").filter(has_text="Stopped.").wait_for()
    wait_until(lambda: len(server.pipeline.cancelled) == 1)
    assert server.pipeline.records == {}
    server.pipeline.gate.set()
    ask(page)
    page.locator("#answer .is-done").filter(has_text=ANSWER).wait_for()


def test_stop_works_before_the_first_word(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    server.fetcher.gate.clear()
    ask(page)
    page.locator("#answer .mm-wait").wait_for()
    wait_until(server.fetcher.is_waiting.is_set)
    shoot(page, "waiting")
    page.locator("#stop").click()
    page.locator("#answer .is-done").filter(has_text="Stopped.").wait_for()
    wait_until(lambda: len(server.pipeline.cancelled) == 1)


def test_closing_the_tab_frees_the_request(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    server.pipeline.gate.clear()
    ask(page)
    page.locator("#answer .is-busy .mm-text").wait_for()
    page.close()
    wait_until(lambda: len(server.pipeline.cancelled) == 1)
    server.pipeline.gate.set()


def test_an_error_is_readable(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    server.pipeline.error = MediaError("Expected a video, but <b>the file</b> is ${broken}")
    ask(page)
    error = page.locator("#answer .mm-error")
    error.wait_for()
    assert error.inner_text() == "Expected a video, but <b>the file</b> is ${broken}"
    shoot(page, "error")
    assert page.locator("#ask").is_visible()


def test_a_question_is_needed(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    page.locator("#ask").click()
    page.locator("#answer .mm-error").filter(has_text="write a question").wait_for()
    assert server.pipeline.prompts == []


def test_options_and_suggestions_reach_the_server(page: Any, server: RunningServer) -> None:  # noqa: ANN401
    page.locator("#options > button").click()
    page.locator("#prune input").click()
    page.get_by_role("option", name="holitom", exact=True).click()
    shoot(page, "options")
    page.locator("#try").get_by_text("Which colour is it?").click()
    page.locator("#ask").click()
    page.locator("#report").get_by_text("holitom").wait_for()
    (prompt,) = server.pipeline.prompts
    assert (prompt.methods.prune, prompt.methods.keep) == ("holitom", 0.25)
    assert page.locator("#question textarea").input_value() == "Which colour is it?"


def test_another_clip_brings_its_own_questions(page: Any) -> None:  # noqa: ANN401
    page.locator("#clip input").click()
    page.get_by_role("option", name="second clip").click()
    page.locator("#try").get_by_text("And in the second clip?").wait_for()


def test_an_own_file_can_be_dropped(page: Any, server: RunningServer, clips: Path) -> None:  # noqa: ANN401
    page.get_by_label("Clear").first.click()
    page.locator("#video input[type=file]").set_input_files(clips / "second_clip.mp4")
    page.locator("#video video").wait_for()
    ask(page, "What is this?")
    page.locator("#answer .is-done").filter(has_text=ANSWER).wait_for()


def test_a_server_that_is_not_ready_is_shown(
    server: RunningServer,
    address: str,
    browser: Any,  # noqa: ANN401
) -> None:
    server.pipeline.is_ready = False
    with browser.new_page() as page:
        page.goto(address)
        page.get_by_text("the server is starting").wait_for()
