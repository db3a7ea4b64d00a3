"""One conformance test over everything that decodes videos: stream, times, rotation, pixels, options."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from mmserve.config import Limits, VideoBackend
from mmserve.errors import ConfigError
from mmserve.media.backends import Frame, describe
from mmserve.media.backends.pyav import VideoReader
from mmserve.media.container import open_container, packets, shown_at
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.sandbox import Sandbox
from mmserve.media.video import decode_frames, plan_video
from mmserve.request import MediaOptions
from tests.media.clips import make_video, reference, shade, shade_of

NAMES: tuple[VideoBackend, ...] = ("pyav", "decord", "torchcodec")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(library) is None, reason="not installed"))
    for name, library in zip(NAMES, ("av", "decord", "torchcodec"), strict=True)
]
ALL = MediaOptions(num_frames=1000)
# libraries differ in how they interpolate chroma
PIXEL_TOLERANCE = 3


@pytest.fixture(params=BACKENDS)
def limits(request: pytest.FixtureRequest) -> MediaLimits:
    return MediaLimits(video_backend=request.param)


def frames_of(path: Path, plan: MediaPlan, limits: MediaLimits) -> list[Frame]:
    decoded = dict(decode_frames(path, plan, range(plan.num_frames), limits))
    assert sorted(decoded) == list(range(plan.num_frames))
    for frame in decoded.values():
        assert frame.shape == (plan.height, plan.width, 3)
    return [decoded[position] for position in range(plan.num_frames)]


def assert_true_frames(path: Path, plan: MediaPlan, limits: MediaLimits) -> None:
    for number, frame in zip(plan.frame_indices, frames_of(path, plan, limits), strict=True):
        assert abs(shade_of(frame) - shade(number)) <= 4, number


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("plain.mp4", "libx264", 0),
        ("reordered.mp4", "libx264", 3),
        ("reordered.mkv", "libx264", 3),
        ("reordered.ts", "libx264", 2),
        ("plain.webm", "libvpx-vp9", 0),
    ],
)
@pytest.mark.parametrize(
    "options", [ALL, MediaOptions(num_frames=5), MediaOptions(fps=3), MediaOptions(keyframes_only=True)]
)
def test_planned_frames_decode_as_themselves(
    tmp_path: Path, limits: MediaLimits, name: str, codec: str, b_frames: int, options: MediaOptions
) -> None:
    path = make_video(tmp_path / name, codec=codec, b_frames=b_frames)
    plan = plan_video(path, options, limits)
    assert plan.decoder.startswith(describe(limits.video_backend))
    assert_true_frames(path, plan, limits)


def test_plans_are_the_same_whoever_decodes(tmp_path: Path, limits: MediaLimits) -> None:
    path = make_video(tmp_path / "clip.mkv", frames=8, ticks=[0, 40, 80, 1500, 1540, 1580, 3000, 3040])
    plan = plan_video(path, MediaOptions(fps=1), limits)
    assert plan.times_s == pytest.approx([0.0, 0.08, 1.58, 3.0])
    assert plan.video == getattr(plan_video(path, MediaOptions(fps=1), MediaLimits()), "video")  # noqa: B009
    assert_true_frames(path, plan, limits)


def test_the_best_of_two_streams_is_used(tmp_path: Path, limits: MediaLimits) -> None:
    path = make_video(tmp_path / "clip.mp4", size=(32, 32), second=(320, 240))
    plan = plan_video(path, ALL, limits)
    assert (plan.width, plan.height) == (320, 240)
    assert_true_frames(path, plan, limits)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("max_pixels", [None, 1024])
def test_frames_are_upright(
    tmp_path: Path, limits: MediaLimits, rotation: int, hflip: bool, max_pixels: int | None
) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=2, rotation=rotation, hflip=hflip)
    options = MediaOptions(max_pixels=max_pixels)
    plan = plan_video(path, options, limits)
    expected = frames_of(path, plan_video(path, options, MediaLimits()), MediaLimits())
    for frame, upright in zip(frames_of(path, plan, limits), expected, strict=True):
        inner = np.abs(frame.astype(int) - upright)
        assert float(inner.mean()) <= PIXEL_TOLERANCE


def test_pixels_agree(tmp_path: Path, limits: MediaLimits) -> None:
    """On a picture with all colours at once; solid ones would hide a wrong matrix or range."""
    path = tmp_path / "clip.mp4"
    down, right = np.mgrid[0:96, 0:128]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.options = {"crf": "10"}
        for index in range(4):
            pixels = np.stack([right * 2, down * 2, 255 - right - down + index * 8], axis=-1).clip(0, 255)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    plan = plan_video(path, ALL, limits)
    with av.open(path) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for ours, expected in zip(frames_of(path, plan, limits), truth, strict=True):
        difference = np.abs(ours.astype(int) - expected)
        assert float(difference.mean()) <= (0 if limits.video_backend == "pyav" else 1)
        assert difference.max() <= (0 if limits.video_backend == "pyav" else 24)


def test_max_pixels_scales_down_in_shape(tmp_path: Path, limits: MediaLimits) -> None:
    path = make_video(tmp_path / "clip.mp4", size=(128, 96), b_frames=2)
    plan = plan_video(path, MediaOptions(num_frames=6, max_pixels=64 * 48), limits)
    assert (plan.width, plan.height) == (64, 48)
    assert plan.decoder.endswith("scaled to 64x48")
    assert_true_frames(path, plan, limits)
    unscaled = plan_video(path, MediaOptions(num_frames=6, max_pixels=128 * 96), limits)
    assert (unscaled.width, unscaled.height) == (128, 96)
    assert "scaled" not in unscaled.decoder


def test_keyframes_alone_are_sampled_on_request(tmp_path: Path, limits: MediaLimits) -> None:
    path = make_video(tmp_path / "clip.mp4", gop=5)
    plan = plan_video(path, MediaOptions(keyframes_only=True), limits)
    assert plan.frame_indices == (0, 5, 10, 15, 20)
    assert plan_video(path, MediaOptions(keyframes_only=True, num_frames=2), limits).frame_indices == (0, 10)
    assert_true_frames(path, plan, limits)


def test_each_works_in_the_sandbox(tmp_path: Path, limits: MediaLimits) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    ref = reference(make_video(tmp_path / "clip.mp4", b_frames=2, rotation=90))
    sandbox = Sandbox(frames, limits)
    try:
        plan = sandbox.plan(ref)
        direct = frames_of(Path(ref.path), plan, limits)
        np.testing.assert_array_equal(sandbox.decode(ref, plan).frames, np.stack(direct))
    finally:
        sandbox.close()


@pytest.mark.parametrize("b_frames", [0, 1, 2, 3])
@pytest.mark.parametrize("gop", [4, 12, 250])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_decoded_for_few_equal_those_of_a_whole_decode(
    tmp_path: Path, b_frames: int, gop: int, suffix: str
) -> None:
    """What is skipped on the way to a frame was not needed for it."""
    path = make_video(tmp_path / f"clip.{suffix}", frames=60, gop=gop, b_frames=b_frames)
    with av.open(path) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for options in (MediaOptions(num_frames=7), MediaOptions(num_frames=23), MediaOptions(fps=0.7)):
        plan = plan_video(path, options, MediaLimits())
        for number, frame in zip(plan.frame_indices, frames_of(path, plan, MediaLimits()), strict=True):
            np.testing.assert_array_equal(frame, truth[number])


def test_a_reader_asked_against_the_plan_finds_everything(tmp_path: Path) -> None:
    """Frames were taken from a cache, or come in another order: what was drained early is decoded again."""
    path = make_video(tmp_path / "clip.mp4", frames=60, gop=12, b_frames=2)
    plan = plan_video(path, MediaOptions(num_frames=20), MediaLimits())
    reader = VideoReader(path, plan, MediaLimits())
    for wanted in ([3], [3], [4, 5], [2], [19], [18], [0, 19], list(range(20))):
        found = dict(reader.read(wanted))
        assert sorted(found) == wanted
        for position, frame in found.items():
            assert abs(shade_of(frame) - shade(plan.frame_indices[position])) <= 4
    reader.close()


def test_a_backend_that_is_not_installed_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MediaLimits.from_config(Limits(), "decord").video_backend == "decord"
    monkeypatch.setattr("mmserve.media.limits.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="installed, but got torchcodec"):
        MediaLimits.from_config(Limits(), "torchcodec")


@pytest.mark.parametrize("b_frames", [0, 2, 3])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_seeks_land_on_the_gop_that_is_needed(tmp_path: Path, b_frames: int, suffix: str) -> None:
    """A seek that lands one GOP early gives the same frames for twice the work."""
    path = make_video(tmp_path / f"clip.{suffix}", frames=60, gop=10, b_frames=b_frames)
    index = plan_video(path, MediaOptions(keyframes_only=True), MediaLimits()).video
    assert index is not None
    assert index.gop_start == (0, 10, 20, 30, 40, 50)
    with open_container(path) as container:
        stream = container.streams.video[0]
        for seek_to, pts in list(zip(index.seek_to, index.pts, strict=True))[1:]:
            container.seek(seek_to, stream=stream)
            assert shown_at(next(packets(container, stream))) == pts
