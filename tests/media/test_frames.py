"""Lists of pictures as video: the same pixels, times by their rate, broken ones lost, limits first (R12)."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmserve.errors import BadRequest, MediaError, MMServeError
from mmserve.media.framelist import Picture, frames_media, read_index, save_pictures
from mmserve.media.frames import FramesReader, plan_frames
from mmserve.media.image import decode_image
from mmserve.media.limits import MediaLimits
from mmserve.media.sandbox import Sandbox
from mmserve.media.store import ContentStore
from mmserve.request import MediaOptions, MediaRef
from tests.media.clips import picture, shade, shade_of
from tests.media.test_image import png_header

LIMITS = MediaLimits(job_deadline_s=20, max_frames=100)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    directory = tmp_path_factory.mktemp("frames")
    made = Sandbox(directory, LIMITS)
    yield made
    made.close()
    assert list(directory.iterdir()) == []


def encoded(index: int, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(index, *size)).save(file, kind)
    return file.getvalue()


def listed(
    pictures: Sequence[Picture], folder: Path, options: MediaOptions | None = None, fps: float | None = None
) -> MediaRef:
    return frames_media(save_pictures(pictures, ContentStore(folder), LIMITS), "frames", options, fps)


def test_pictures_of_every_kind_are_the_frames_of_a_video(sandbox: Sandbox, tmp_path: Path) -> None:
    on_disk = tmp_path / "2.png"
    on_disk.write_bytes(encoded(2, kind="PNG"))
    pictures: list[Picture] = [encoded(0), picture(1, 64, 48), on_disk, encoded(3, kind="WEBP")]
    ref = listed(pictures, tmp_path, fps=4.0)
    plan = sandbox.plan(ref)
    assert (plan.kind, plan.width, plan.height, plan.fps, plan.duration_s) == ("frames", 64, 48, 4.0, 1.0)
    assert plan.times_s == (0.0, 0.25, 0.5, 0.75)
    decoded = sandbox.decode(ref, plan)
    assert decoded.lost == ()
    assert [shade_of(frame) for frame in decoded.frames] == pytest.approx([shade(i) for i in range(4)], abs=2)
    assert (decoded.frames[0] == decode_image(io.BytesIO(encoded(0)), LIMITS)).all()
    assert (decoded.frames[1] == picture(1, 64, 48)).all()
    again = sandbox.decode(ref, plan, [3, 1])
    assert (again.frames == decoded.frames[[1, 3]]).all()


@pytest.mark.parametrize(
    ("options", "fps", "chosen", "rate"),
    [
        (MediaOptions(), None, range(40), 2.0),
        (MediaOptions(), 5.0, range(40), 5.0),
        (MediaOptions(fps=5.0), None, range(40), 5.0),
        (MediaOptions(fps=1.0), 5.0, range(0, 40, 5), 5.0),
        (MediaOptions(num_frames=4), 5.0, [0, 10, 20, 30], 5.0),
        (MediaOptions(start_s=1.0, end_s=2.0), 5.0, range(5, 10), 5.0),
        (MediaOptions(start_s=1.0, end_s=2.0, num_frames=2), 5.0, [5, 7], 5.0),
        (MediaOptions(keyframes_only=True), 5.0, range(40), 5.0),
    ],
)
def test_all_frames_are_used_unless_options_ask_for_fewer(
    sandbox: Sandbox,
    tmp_path: Path,
    options: MediaOptions,
    fps: float | None,
    chosen: Sequence[int],
    rate: float,
) -> None:
    one = picture(0, 8, 8)
    plan = sandbox.plan(listed([one] * 40, tmp_path, options, fps))
    assert plan.frame_indices == tuple(chosen)
    assert plan.times_s == pytest.approx([index / rate for index in chosen])
    assert plan.total_frames == 40


def test_a_broken_frame_is_lost_and_the_others_are_not(sandbox: Sandbox, tmp_path: Path) -> None:
    torn = encoded(2)
    pictures = [b"no picture", encoded(1), torn[: len(torn) // 2], encoded(3), b"", encoded(5)]
    ref = listed(pictures, tmp_path)
    plan = sandbox.plan(ref)
    assert plan.num_frames == 6
    decoded = sandbox.decode(ref, plan)
    assert (decoded.positions, decoded.lost) == ((1, 3, 5), (0, 2, 4))
    assert shade_of(decoded.frames[1]) == pytest.approx(shade(3), abs=2)


def test_frames_of_other_sizes_are_scaled_to_the_first(sandbox: Sandbox, tmp_path: Path) -> None:
    pictures: list[Picture] = [encoded(0, (64, 48)), encoded(1, (30, 90)), picture(2, 128, 96)]
    ref = listed(pictures, tmp_path)
    decoded = sandbox.decode(ref, sandbox.plan(ref))
    assert decoded.frames.shape == (3, 48, 64, 3)
    assert [shade_of(frame) for frame in decoded.frames] == pytest.approx([shade(i) for i in range(3)], abs=2)


def test_frames_are_scaled_down_on_request(sandbox: Sandbox, tmp_path: Path) -> None:
    full = listed([encoded(0)], tmp_path)
    small = listed([encoded(0)], tmp_path, MediaOptions(max_pixels=12 * 16))
    plans = [sandbox.plan(ref) for ref in (full, small)]
    assert (plans[1].width, plans[1].height) == (16, 12)
    assert plans[0].decoder != plans[1].decoder
    assert sandbox.decode(small, plans[1]).frames.shape == (1, 12, 16, 3)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([b"no", b"pictures"], "none of them can"),
        ([encoded(0), png_header(20_000, 20)], "at most 16384"),
        ([encoded(0), png_header(16_000, 16_000)], "pixels per frame"),
        ([encoded(0), png_header(65_535, 65_535)], "at most"),
        ([encoded(0), *[png_header(8_000, 4_000)] * 3], "90000000 pixels over all"),
    ],
)
def test_headers_are_judged_before_a_frame_is_decoded(
    tmp_path: Path, pictures: list[Picture], words: str
) -> None:
    ref = listed(pictures, tmp_path)
    began = time.perf_counter()
    with pytest.raises(MediaError, match=words):
        plan_frames(ref, MediaLimits(max_total_pixels=90_000_000))
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("pictures", "error", "words"),
    [
        ([], BadRequest, "at least one frame"),
        ([b"x"] * 101, MediaError, "at most 100 frames"),
        ([np.zeros((4, 4), np.uint8)], BadRequest, "uint8 pixels"),
        ([np.zeros((4, 4, 3), np.float32)], BadRequest, "uint8 pixels"),
        ([bytes(60_000_000), bytes(60_000_000)], MediaError, "bytes of frames"),
    ],
)
def test_what_cannot_be_a_list_is_not_stored(
    tmp_path: Path, pictures: list[Picture], error: type[MMServeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        save_pictures(pictures, ContentStore(tmp_path), LIMITS)
    assert list(tmp_path.iterdir()) == []


def test_equal_lists_have_equal_digests_and_others_have_not(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    digests = [
        save_pictures(pictures, store, LIMITS).digest
        for pictures in ([b"ab", b"c"], [b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("cut", [0, 5, 11, 12, 20, 27, 40])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, cut: int) -> None:
    whole = save_pictures([b"abcdefgh", b"ijklmnop"], ContentStore(tmp_path), LIMITS).path.read_bytes()
    with pytest.raises(MediaError, match="not a list of frames"):
        read_index(io.BytesIO(whole[:cut]), LIMITS)
    with pytest.raises(MediaError, match="not a list of frames"):
        read_index(io.BytesIO(b"mmframe2" + whole[8:]), LIMITS)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_pictures_are_lost_or_refused_in_our_words(tmp_path: Path, data: st.DataObject) -> None:
    """R14."""
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))
    content = bytearray(encoded(1, (16, 12), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    ref = listed([encoded(0, (16, 12)), bytes(content[:cut])], tmp_path)
    try:
        plan = plan_frames(ref, LIMITS)
        with closing(FramesReader(ref.path, plan, LIMITS)) as reader:
            found = dict(reader.read(range(plan.num_frames)))
        assert found.keys() <= {0, 1}
        assert all(frame.shape == (plan.height, plan.width, 3) for frame in found.values())
    except MediaError as error:
        assert "Expected" in error.public_message
