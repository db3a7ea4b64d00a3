"""Animated WebP and GIF: all frames as a video, the first as an image; hostile ones cost nothing (R12)."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mmserve.errors import MediaError
from mmserve.media.animation import plan_animation
from mmserve.media.image import decode_image
from mmserve.media.limits import MediaLimits
from mmserve.media.sandbox import Sandbox
from mmserve.request import MediaOptions, MediaRef
from tests.media.clips import picture, reference, shade, shade_of

LIMITS = MediaLimits(job_deadline_s=20)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path_factory.mktemp("frames"), LIMITS)
    yield made
    made.close()


def animate(path: Path, frames: int = 6, durations: int | Sequence[int] = 100, **more: Any) -> Path:  # noqa: ANN401
    images = [Image.fromarray(picture(index, 64, 48)) for index in range(frames)]
    duration = durations if isinstance(durations, int) else list(durations)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, **more)
    return path


def shades(frames: npt.NDArray[np.uint8]) -> list[int]:
    return [shade_of(frame) for frame in frames]


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_as_a_video_it_is_all_frames(sandbox: Sandbox, tmp_path: Path, ending: str) -> None:
    ref = reference(animate(tmp_path / f"moves.{ending}", durations=[100, 200, 100, 300, 100, 100]))
    plan = sandbox.plan(ref)
    assert plan.times_s == pytest.approx((0.0, 0.1, 0.3, 0.4, 0.7, 0.8))
    assert plan.duration_s == pytest.approx(0.9)
    assert (plan.width, plan.height, plan.total_frames) == (64, 48, 6)
    decoded = sandbox.decode(ref, plan)
    assert decoded.lost == ()
    expected = [shade(index) for index in range(6)]
    assert shades(decoded.frames) == pytest.approx(expected, abs=3)
    # forward in pieces, then back to the beginning
    for positions in ([1, 2], [4], [0, 5]):
        part = sandbox.decode(ref, plan, positions)
        assert shades(part.frames) == pytest.approx([expected[i] for i in positions], abs=3)


@pytest.mark.parametrize("ending", ["webp", "gif", "png"])
def test_as_an_image_it_is_its_first_frame(sandbox: Sandbox, tmp_path: Path, ending: str) -> None:
    path = animate(tmp_path / f"moves.{ending}")
    ref = MediaRef(modality="image", path=str(path), digest="0" * 64, source="moves")
    plan = sandbox.plan(ref)
    assert (plan.kind, plan.num_frames, plan.times_s) == ("image", 1, (0.0,))
    assert shades(sandbox.decode(ref, plan).frames) == pytest.approx([shade(0)], abs=3)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (MediaOptions(num_frames=2), (0, 5)),
        (MediaOptions(fps=5.0), (0, 2, 4, 6, 8)),
        (MediaOptions(start_s=0.35, end_s=0.65), (4, 5, 6)),
        (MediaOptions(keyframes_only=True), (0,)),
    ],
)
def test_a_webp_is_sampled_as_any_video(
    tmp_path: Path, options: MediaOptions, chosen: tuple[int, ...]
) -> None:
    path = animate(tmp_path / "moves.webp", frames=10)
    assert plan_animation(path, options, LIMITS).frame_indices == chosen


def test_a_still_webp_is_a_video_of_one_frame(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "still.webp"
    Image.fromarray(picture(3, 64, 48)).save(path)
    plan = sandbox.plan(reference(path))
    assert (plan.num_frames, plan.total_frames) == (1, 1)
    assert shades(sandbox.decode(reference(path), plan).frames) == pytest.approx([shade(3)], abs=3)


def test_frames_without_a_duration_are_never_shown(sandbox: Sandbox, tmp_path: Path) -> None:
    ref = reference(animate(tmp_path / "some.webp", durations=[100, 0, 100, 0, 100, 100]))
    plan = sandbox.plan(ref)
    assert plan.frame_indices == (0, 2, 4, 5)
    assert len(set(plan.times_s)) == 4
    none = plan_animation(animate(tmp_path / "none.webp", durations=0), MediaOptions(), LIMITS)
    assert none.times_s == pytest.approx([index / 10 for index in range(6)])


def test_transparency_is_laid_over_white(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "clear.webp"
    images = [Image.new("RGBA", (32, 32), (index, 0, 0, 0)) for index in (10, 20)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, lossless=True)
    ref = reference(path)
    assert (sandbox.decode(ref, sandbox.plan(ref)).frames == 255).all()


def test_frames_are_scaled_down_on_request(sandbox: Sandbox, tmp_path: Path) -> None:
    ref = reference(animate(tmp_path / "moves.webp"))
    ref = msgspec.structs.replace(ref, options=MediaOptions(max_pixels=12 * 16))
    plan = sandbox.plan(ref)
    assert sandbox.decode(ref, plan).frames.shape == (6, 12, 16, 3)


def chunks(content: bytes) -> list[int]:
    """Where each ANMF chunk begins."""
    places, place = [], 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if name == b"ANMF":
            places.append(place)
        place += 8 + size + size % 2
    return places


def test_frames_after_a_broken_one_are_lost(sandbox: Sandbox, tmp_path: Path) -> None:
    whole = bytearray(animate(tmp_path / "moves.webp", lossless=True).read_bytes())
    third, fourth = chunks(bytes(whole))[3:5]
    body = third + 8 + 16 + 8 + 5  # behind the headers of chunk, frame, picture and codec
    whole[body:fourth] = b"\xff" * (fourth - body)
    broken = tmp_path / "broken.webp"
    broken.write_bytes(whole)
    ref = reference(broken)
    plan = sandbox.plan(ref)
    decoded = sandbox.decode(ref, plan)
    assert plan.num_frames == 6
    assert (decoded.positions, decoded.lost) == ((0, 1, 2), (3, 4, 5))


@pytest.mark.parametrize("ending", ["webp", "gif"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_torn_file_is_refused_or_loses_frames(
    sandbox: Sandbox, tmp_path: Path, ending: str, share: float
) -> None:
    whole = animate(tmp_path / f"moves.{ending}").read_bytes()
    torn = tmp_path / f"torn.{ending}"
    torn.write_bytes(whole[: int(len(whole) * share)])
    ref = reference(torn)
    try:
        plan = sandbox.plan(ref)
        decoded = sandbox.decode(ref, plan)
        assert len(decoded.positions) + len(decoded.lost) == plan.num_frames <= 6
    except MediaError as error:
        assert str(torn) not in error.public_message


def test_an_animation_of_too_many_pixels_is_refused_at_once(tmp_path: Path) -> None:
    path = animate(tmp_path / "moves.webp", frames=2)
    content = path.read_bytes()
    (_, last) = chunks(content)
    bomb = tmp_path / "bomb.webp"
    # the same frame for ever: 20,000 of them in a few megabytes
    body = content[:last] + content[last:] * 20_000
    bomb.write_bytes(body[:4] + struct.pack("<I", len(body) - 8) + body[8:])
    began = time.perf_counter()
    with pytest.raises(MediaError, match="pixels over all frames"):
        plan_animation(bomb, MediaOptions(), MediaLimits(max_total_pixels=50_000_000))
    with pytest.raises(MediaError, match="at most 1000 frames"):
        plan_animation(bomb, MediaOptions(), MediaLimits(max_source_frames=1000))
    with pytest.raises(MediaError, match="of at most 60 s"):
        plan_animation(bomb, MediaOptions(), MediaLimits(max_duration_s=60.0))
    assert time.perf_counter() - began < 1.0


def test_the_rest_of_a_still_file_is_no_animation(tmp_path: Path) -> None:
    path = tmp_path / "still.webp"
    Image.fromarray(picture(3, 64, 48)).save(path)
    path.write_bytes(path.read_bytes() + b"ANMF")
    assert decode_image(path, LIMITS).shape == (48, 64, 3)
    assert plan_animation(path, MediaOptions(), LIMITS).num_frames == 1
