"""What is decoded and encoded, by the server's own counters: once for many, and only what is new."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Served, serving, video_part
from tests.media.clips import make_video

FRAME_TOKENS = 36
QUESTIONS = [f"How many objects are there after {number} seconds?" for number in range(8)]
ENCODED = ("items_encoded", "crops_encoded", "frames_decoded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, Any]:
    tiers = {"disk_path": str(folder / "cache"), "disk_bytes": 64 << 20}
    return {"cache": {"embedding_tiers": tiers}}


@pytest.fixture(scope="module")
def server(folder: Path, settings: dict[str, Any]) -> Iterator[Served]:
    with serving(folder, settings) as running:
        yield running


@pytest.fixture(scope="module")
def clips(folder: Path) -> list[Path]:
    """Six videos of 20 s, 4 frames a second, each of another size."""
    return [make_video(folder / f"{n}.mp4", frames=80, rate=4, size=(64 + 8 * n, 48)) for n in range(6)]


def more(server: Served, before: dict[str, float]) -> dict[str, float]:
    """What has been added to the counters of work since."""
    after = server.settled()
    names = {name.partition("/")[2] for name in after if name.startswith("encode_events/")}
    return {
        name: after[f"encode_events/{name}"] - before.get(f"encode_events/{name}", 0)
        for name in sorted(names)
    }


def ask_all(server: Served, asked: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    def ask(clip: Path, question: str) -> dict[str, Any]:
        response = server.ask(video_part(clip), text=question, mmserve={"report": True})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(ask, *zip(*asked, strict=True)))


def test_one_video_for_32_clients_is_decoded_and_encoded_once(server: Served, clips: list[Path]) -> None:
    before = server.settled(60)
    answers = ask_all(server, [(clips[0], "How many objects are there?")] * 32)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    done = more(server, before)
    assert done["items_opened"] == 1
    assert done["frames_decoded"] == done["crops_encoded"] == 32
    assert (done["items_encoded"], done["items_cached"]) == (1, 31)


def test_eight_questions_each_about_four_videos_are_four_encodes(server: Served, clips: list[Path]) -> None:
    before = server.settled(60)
    ask_all(server, [(clip, question) for question in QUESTIONS for clip in clips[1:5]])
    done = more(server, before)
    assert (done["items_encoded"], done["items_cached"]) == (4, 28)
    assert done["frames_decoded"] == done["crops_encoded"] == 4 * 32
    after = server.counts()
    assert after["embedding_cache_bytes/memory"] > 0
    assert after["held_bytes/media"] == after["held_bytes/bodies"] == 0


def test_of_an_overlapping_range_only_what_is_new_is_encoded(server: Served, clips: list[Path]) -> None:
    """Seconds 10 to 20 after 0 to 15 at 2 frames a second: of 20 frames 10 are there."""
    before = server.settled(60)
    part = video_part(clips[5])

    def ask(**video: float) -> dict[str, Any]:
        response = server.ask(part, media_io_kwargs={"video": video}, mmserve={"report": True})
        assert response.status_code == 200, response.text
        report: dict[str, Any] = response.json()["usage"]["mmserve"]
        return report

    first = ask(fps=2, start=0, end=15)
    assert first["media"][0]["timestamps_s"] == [k / 2 for k in range(30)]
    done = more(server, before)
    assert done["frames_decoded"] == done["crops_encoded"] == 30
    second = ask(fps=2, start=10, end=20)
    assert second["media"][0]["timestamps_s"] == [k / 2 for k in range(20, 40)]
    assert second["usage"]["visual_tokens_cached"] == 10 * FRAME_TOKENS
    done = more(server, before)
    assert done["frames_decoded"] == done["crops_encoded"] == 30 + 10
    # nothing new, wherever a range begins
    third = ask(fps=2, start=3.7, end=17.2)
    assert third["media"][0]["timestamps_s"] == [k / 2 for k in range(8, 35)]
    done = more(server, before)
    assert done["frames_decoded"] == done["crops_encoded"] == 40
    # half the rate is every other frame
    ask(fps=1)
    assert more(server, before)["frames_decoded"] == 40


def test_after_a_restart_with_a_disk_nothing_is_encoded(
    server: Served, clips: list[Path], folder: Path, settings: dict[str, Any]
) -> None:
    """The server before has ended: this test is the last one of the module that uses it."""
    before = ask_all(server, [(clip, QUESTIONS[0]) for clip in clips[:5]])
    assert server.settled()["embedding_cache_bytes/disk"] > 0
    server.process.terminate()
    server.process.wait(40)
    with serving(folder, settings) as again:
        after = ask_all(again, [(clip, QUESTIONS[0]) for clip in clips[:5]])
        counts = again.settled()
    for first, second in zip(before, after, strict=True):
        assert second["choices"][0]["message"] == first["choices"][0]["message"]
    assert not any(counts.get(f"encode_events/{name}") for name in ENCODED)
    assert counts["encode_events/items_cached"] == 5
    assert counts["embedding_cache_events/hits/disk"] == 5 * 32
    assert counts["embedding_cache_events/misses/disk"] == 0
    assert counts["embedding_cache_events/misses/memory"] == 5 * 32
