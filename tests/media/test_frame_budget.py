"""One budget of frames, pixels and seconds for everything with several frames, before decoding (R12)."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from mmserve.config import Limits
from mmserve.conversation import parse
from mmserve.errors import BadRequest, MediaError, MMServeError
from mmserve.media.data_url import read_data_url
from mmserve.media.framelist import frames_media, save_pictures
from mmserve.media.frames import plan_frames
from mmserve.media.limits import MediaLimits
from mmserve.media.store import ContentStore
from mmserve.media.video import plan_video
from mmserve.request import MediaOptions
from tests.media.clips import make_video

LIMITS = MediaLimits.from_config(Limits())


@contextmanager
def refused_within_200_ms(error: type[MMServeError], words: str) -> Iterator[None]:
    began = time.process_time()
    with pytest.raises(error, match=words) as caught:
        yield
    assert time.process_time() - began < 0.2
    assert 400 <= caught.value.status < 500


def one_gif(side: int) -> tuple[bytes, bytes]:
    """The head of a GIF, and a frame of it that may be repeated for ever."""
    file = io.BytesIO()
    images = [Image.new("P", (side, side), number) for number in (1, 2)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=40, optimize=False)
    whole = file.getvalue()
    second = whole.rindex(b"\x21\xf9\x04")  # a frame begins with its graphic control
    return whole[:second], whole[second:-1]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_small_gif_of_7_gigabytes_is_refused(tmp_path: Path, backend: str) -> None:
    """R12: 600 frames of 2048 x 2048 in a few megabytes, which paint over each other."""
    head, frame = one_gif(2048)
    path = tmp_path / "bomb.gif"
    path.write_bytes(head + frame * 599 + b"\x3b")
    assert path.stat().st_size < 8e6
    limits = MediaLimits(max_total_pixels=1_000_000_000, video_backend=backend)
    with refused_within_200_ms(MediaError, r"pixels over all frames, but got 25\d{8} \(600 frames"):
        plan_video(path, MediaOptions(), limits)
    # few of its frames cost as much
    with refused_within_200_ms(MediaError, "an animation of at most"):
        plan_video(path, MediaOptions(num_frames=2), limits)


def test_ten_thousand_frames_in_a_data_url_are_refused() -> None:
    """R12: frames joined by commas are counted before one is decoded."""
    url = "data:video/jpeg;base64," + ",".join(["/9j/"] * 10_000)
    with refused_within_200_ms(MediaError, "at most 2048 frames in a list, but got 10000"):
        read_data_url(url, "video", LIMITS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}] * 1000, "at most 64 parts"),
        ([{"type": "video", "video": ["https://a.example/x.png"] * 10_000}], "but got 10000"),
    ],
)
def test_a_thousand_pictures_in_a_message_are_refused(content: list[dict[str, object]], words: str) -> None:
    """R12: parts and lists of frames are counted before one is fetched."""
    with refused_within_200_ms(BadRequest, words):
        parse([{"role": "user", "content": content}], max_frames=LIMITS.max_frames)


def test_times_that_make_no_sense_are_no_more_frames(tmp_path: Path) -> None:
    """R12: whatever rate a file claims, no more frames are sampled than asked for."""
    ticks = [0, *range(100_000, 100_023)]  # a gap, then a thousand frames a second
    path = make_video(tmp_path / "clip.mkv", frames=24, ticks=ticks)
    assert plan_video(path, MediaOptions(), LIMITS).num_frames == 24
    assert plan_video(path, MediaOptions(fps=1000.0), LIMITS).num_frames == 24
    assert plan_video(path, MediaOptions(fps=1.0), LIMITS).num_frames == 2
    with refused_within_200_ms(BadRequest, "fps above 0 and at most 1000"):
        plan_video(path, MediaOptions(fps=1e9), LIMITS)


def test_a_header_of_ten_hours_is_refused(tmp_path: Path) -> None:
    """R12: three frames may last a working day."""
    path = make_video(tmp_path / "clip.mkv", frames=3, ticks=[0, 40, 36_000_000])
    assert path.stat().st_size < 10_000
    with refused_within_200_ms(MediaError, "at most 14400 s, but got 36000 s"):
        plan_video(path, MediaOptions(), LIMITS)


def test_pictures_in_a_list_have_the_same_budget(tmp_path: Path) -> None:
    """R12: the sum of their pixels by their headers."""
    file = io.BytesIO()
    Image.new("1", (4000, 4000)).save(file, "PNG")
    stored = save_pictures([file.getvalue()] * 600, ContentStore(tmp_path), LIMITS)
    with refused_within_200_ms(MediaError, "4000000000 pixels over all frames, but got 9600000000"):
        plan_frames(frames_media(stored, "frames"), LIMITS)


def test_by_default_32_frames_are_sampled(tmp_path: Path) -> None:
    """R12: the default of vLLM."""
    path = make_video(tmp_path / "clip.mp4", frames=100)
    assert plan_video(path, MediaOptions(), LIMITS).num_frames == 32
    with refused_within_200_ms(MediaError, "num_frames of at most 2048, but got 2049"):
        plan_video(path, MediaOptions(num_frames=2049), LIMITS)
