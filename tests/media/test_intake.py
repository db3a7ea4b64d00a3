"""From the parts of a conversation to files here: lists of frames, names, budgets of bytes (R12, R30)."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmserve.conversation import MediaPart
from mmserve.errors import (
    BadRequest,
    Forbidden,
    MediaError,
    MediaNotFound,
    MMServeError,
    Overloaded,
    TooLarge,
)
from mmserve.media.fetch import Fetcher, FetchPolicy
from mmserve.media.framelist import SUFFIX, read_index
from mmserve.media.intake import Intake
from mmserve.media.limits import MediaLimits
from mmserve.request import MediaOptions, MediaRef
from tests.media.clips import picture
from tests.media.web import PNG, Page, Site, leftovers, resolver

LIMITS = MediaLimits(max_frames=20, max_image_bytes=1000, max_video_bytes=10_000)
JPEGS = [b"jpeg %d" % number for number in range(3)]


def intake(
    folder: Path,
    site: Site | None = None,
    *,
    limits: MediaLimits = LIMITS,
    max_held_bytes: int | None = None,
    file_root: Path | None = None,
) -> Intake:
    fetcher = Fetcher(
        FetchPolicy(file_root=file_root),
        limits,
        folder,
        max_held_bytes=max_held_bytes,
        resolver=resolver(["1.1.1.1"]),
        transport=(site or Site()).transport(),
    )
    return Intake(fetcher, 1 << 20)


def bring(taking: Intake, part: MediaPart, tenant: str = "") -> MediaRef:
    return asyncio.run(taking.bring(part, tenant))


def frames_url(*frames: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


def pictures_of(ref: MediaRef) -> list[bytes]:
    with open(ref.path, "rb") as file:
        contents = []
        for entry in read_index(file, LIMITS):
            file.seek(entry.offset)
            contents.append(file.read(entry.size))
        return contents


def test_frames_in_a_data_url(tmp_path: Path) -> None:
    taking = intake(tmp_path)
    ref = bring(taking, MediaPart("video", frames_url(*JPEGS), MediaOptions(fps=4.0)))
    assert pictures_of(ref) == JPEGS
    assert (ref.modality, ref.source, ref.path.endswith(SUFFIX)) == ("video", "data:video/jpeg", True)
    # the rate that vLLM's clients send in media_io_kwargs
    assert (ref.array_fps, ref.options) == (4.0, MediaOptions())
    taking.release(ref)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("data:video/jpeg;base64,", BadRequest, "frame 0 of the data: URL, but it is empty"),
        (frames_url(b"a", b"", b"c"), BadRequest, "frame 1 of the data: URL, but it is empty"),
        (frames_url(b"a") + ",???", BadRequest, "base64 in frame 1"),
        (frames_url(b"a") + ",YQ", BadRequest, "base64 in frame 1"),
        (frames_url(b"a") + ",\u00e9", BadRequest, "base64 in frame 1"),
        (frames_url(*[b"a"] * 21), MediaError, "at most 20 frames"),
        (frames_url(*[bytes(2000)] * 10), TooLarge, "at most 10000 bytes of frames"),
        ("data:video/jpeg;base64," + "," * 1_000_000, MediaError, "at most 20 frames"),
        ("data:image/jpeg;base64,YQ==", BadRequest, "type video, but got image"),
    ],
)
def test_wrong_frames_in_a_data_url(tmp_path: Path, url: str, error: type[MMServeError], words: str) -> None:
    began = time.perf_counter()
    with pytest.raises(error, match=words):
        bring(intake(tmp_path), MediaPart("video", url))
    assert time.perf_counter() - began < 0.5
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_may_be_a_video(tmp_path: Path, kind: str) -> None:
    url = f"data:image/{kind};base64,YWJj"
    for modality in ("image", "video"):
        ref = bring(intake(tmp_path), MediaPart(modality, url))
        assert (ref.modality, Path(ref.path).read_bytes()) == (modality, b"abc")


def test_a_list_of_urls_is_fetched_in_its_order(tmp_path: Path) -> None:
    pages: dict[str, Page] = {f"/{number}": (200, {}, b"page %d" % number) for number in range(12)}
    site = Site(pages)
    taking = intake(tmp_path, site)
    urls = [f"https://h.example/{number}" for number in range(12)]
    urls.insert(3, "data:image/png;base64," + base64.b64encode(PNG).decode())
    ref = bring(taking, MediaPart("video", tuple(urls), fps=5.0))
    expected = [b"page %d" % number for number in range(12)]
    assert pictures_of(ref) == [*expected[:3], PNG, *expected[3:]]
    assert (ref.array_fps, ref.source, len(site.requests)) == (5.0, "frames", 12)
    assert leftovers(tmp_path) == [Path(ref.path).name]


@pytest.mark.parametrize(
    ("urls", "error", "words"),
    [
        (
            ("https://h.example/a", "https://h.example/gone"),
            MediaError,
            "Frame 1 of the video: Expected status",
        ),
        (
            ("https://h.example/a", "http://h.example/a"),
            BadRequest,
            "Frame 1 of the video: Expected a URL of",
        ),
        (("https://h.example/a", "file:///etc/passwd"), Forbidden, "Frame 1 of the video: file: URLs"),
        (("data:video/mp4;base64,AAAA",), BadRequest, "type image, but got video"),
        (("https://h.example/large",), TooLarge, "at most 1000 bytes"),
        (("https://h.example/some",) * 15, TooLarge, "at most 10000 bytes of frames"),
        (("https://h.example/a",) * 21, MediaError, "at most 20 frames"),
    ],
)
def test_one_wrong_frame_refuses_the_list(
    tmp_path: Path, urls: tuple[str, ...], error: type[MMServeError], words: str
) -> None:
    pages: dict[str, Page] = {
        "/gone": (404, {}, b""),
        "/large": (200, {}, bytes(1001)),
        "/some": (200, {}, bytes(900)),
    }
    with pytest.raises(error, match=words):
        bring(intake(tmp_path, Site(pages)), MediaPart("video", urls))
    assert leftovers(tmp_path) == []


def test_a_name_is_its_tenants(tmp_path: Path) -> None:
    site = Site()
    taking = intake(tmp_path, site)
    sent = bring(taking, MediaPart("image", "https://h.example/a.png", uuid="one"), "tenant")
    taking.release(sent)
    found = bring(taking, MediaPart("image", None, uuid="one"), "tenant")
    assert (found, len(site.requests)) == (sent, 1)
    for stranger in ("", "other"):
        with pytest.raises(MediaNotFound, match="uuid 'one'"):
            bring(taking, MediaPart("image", None, uuid="one"), stranger)
    taking.release(found)


def test_media_found_again_are_sampled_anew(tmp_path: Path) -> None:
    taking = intake(tmp_path)
    video = MediaPart("video", frames_url(*JPEGS), MediaOptions(num_frames=1), fps=4.0, uuid="clip")
    assert bring(taking, video).options == MediaOptions(num_frames=1)
    found = bring(taking, MediaPart("video", None, MediaOptions(num_frames=2), uuid="clip"))
    assert (found.options, found.array_fps) == (MediaOptions(num_frames=2), 4.0)
    assert bring(taking, MediaPart("video", None, fps=8.0, uuid="clip")).array_fps == 8.0


@pytest.mark.parametrize("announced", [True, False])
def test_more_bytes_than_the_budget_come_back_later(tmp_path: Path, announced: bool) -> None:
    body = bytes(900)
    headers = {"content-length": "900"} if announced else {}
    site = Site({f"/{number}": (200, headers, body + b"%d" % number) for number in range(9)})
    taking = intake(tmp_path, site, max_held_bytes=4000)
    held = [bring(taking, MediaPart("image", f"https://h.example/{number}")) for number in range(4)]
    with pytest.raises(Overloaded) as caught:
        bring(taking, MediaPart("image", "https://h.example/5"))
    assert (caught.value.status, caught.value.retryable) == (429, True)
    with pytest.raises(Overloaded):
        bring(taking, MediaPart("image", "data:image/png;base64," + base64.b64encode(body).decode()))
    with pytest.raises(Overloaded):
        bring(taking, MediaPart("video", frames_url(body)))
    assert len(leftovers(tmp_path)) == 4
    for ref in held:
        taking.release(ref)
    taking.release(bring(taking, MediaPart("image", "https://h.example/5")))
    assert leftovers(tmp_path) == []


def test_a_cancelled_list_leaves_nothing(tmp_path: Path) -> None:
    taking = intake(tmp_path)

    async def begin_and_leave() -> None:
        urls = tuple(f"https://h.example/{number}" for number in range(20))
        fetching = asyncio.ensure_future(taking.bring(MediaPart("video", urls)))
        for _ in range(5):
            await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)

    asyncio.run(begin_and_leave())
    assert leftovers(tmp_path) == []


# for the user of this process


def test_frames_of_a_user_may_be_anything_that_shows_a_picture(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    taking = intake(store)
    path = tmp_path / "a.png"
    Image.fromarray(picture(0, 8, 8)).save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    array = picture(1, 8, 8)
    contents = (path, str(path), path.as_uri(), url, array, Image.fromarray(array))
    ref = taking.resolve(MediaPart("video", contents, fps=2.0))
    assert pictures_of(ref) == [path.read_bytes()] * 4 + [array.tobytes()] * 2
    assert leftovers(store) == [Path(ref.path).name]
    taking.release(ref)
    assert leftovers(store) == []
    assert path.exists()


def test_a_users_media_have_names_too(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    taking = intake(store)
    array = np.zeros((2, 4, 4, 3), np.uint8)
    sent = taking.resolve(MediaPart("video", array, fps=2.0, uuid="frames"))
    taking.release(sent)
    assert taking.resolve(MediaPart("video", None, uuid="frames")) == sent
    with pytest.raises(MediaNotFound):
        taking.resolve(MediaPart("image", None, uuid="frames"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((np.zeros((4, 4)),), "uint8 pixels"),
        ((object(),), "but got object"),
        ((np.zeros((1, 4, 4, 3), np.uint8),), "uint8 pixels"),
    ],
)
def test_what_shows_no_picture_is_refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        intake(tmp_path).resolve(MediaPart("video", content, fps=2.0))


def test_the_frames_of_a_gif_url_are_one_file(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(0, 8, 8)).save(file, "GIF")
    url = "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()
    ref = intake(tmp_path, limits=MediaLimits()).resolve(MediaPart("video", url))
    assert Path(ref.path).read_bytes() == file.getvalue()
