"""Videos that the tests encode themselves: which frames are sampled, and that exactly those come back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from mmserve.errors import BadRequest, MediaError
from mmserve.media.backends.pyav import VideoReader
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan, sample, sample_count
from mmserve.media.video import decode_frames, plan_video
from mmserve.request import MediaOptions
from tests.media.clips import make_video, shade, shade_of

LIMITS = MediaLimits()
ALL = MediaOptions(num_frames=1000)


def assert_true_frames(path: Path, plan: MediaPlan, positions: list[int] | None = None) -> None:
    wanted = list(range(plan.num_frames)) if positions is None else positions
    decoded = dict(decode_frames(path, plan, wanted))
    assert sorted(decoded) == sorted(set(wanted))
    for position, frame in decoded.items():
        assert frame.shape == (plan.height, plan.width, 3)
        assert abs(shade_of(frame) - shade(plan.frame_indices[position])) <= 4, position


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("plain.mp4", "libx264", 0),
        ("reordered.mp4", "libx264", 3),
        ("reordered.mkv", "libx264", 3),
        ("reordered.ts", "libx264", 2),
        ("plain.mov", "libx264", 1),
        ("plain.avi", "mpeg4", 0),
        ("plain.webm", "libvpx-vp9", 0),
    ],
)
def test_every_planned_frame_decodes_as_itself(tmp_path: Path, name: str, codec: str, b_frames: int) -> None:
    path = make_video(tmp_path / name, codec=codec, b_frames=b_frames)
    plan = plan_video(path, ALL, LIMITS)
    assert (plan.width, plan.height, plan.total_frames, plan.num_frames) == (64, 48, 24, 24)
    assert plan.fps == pytest.approx(12, rel=0.02)
    assert plan.duration_s == pytest.approx(2.0, abs=0.1)
    assert_true_frames(path, plan)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positions=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    later=st.lists(st.integers(0, 23), max_size=3),
)
def test_a_reader_finds_frames_in_any_order_of_calls(
    tmp_path: Path, positions: list[int], later: list[int]
) -> None:
    path = tmp_path / "clip.mp4"
    if not path.exists():
        make_video(path, b_frames=2, gop=5)
    plan = plan_video(path, ALL, LIMITS)
    reader = VideoReader(path, plan, LIMITS)
    for wanted in (positions, later):
        for position, frame in reader.read(wanted):
            assert abs(shade_of(frame) - shade(position)) <= 4
    reader.close()
    assert_true_frames(path, plan, positions)


def test_default_is_32_frames_spread_as_transformers_does(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=50)
    plan = plan_video(path, MediaOptions(), LIMITS)
    assert plan.frame_indices == tuple(index * 50 // 32 for index in range(32))
    assert plan.times_s == pytest.approx([index / 12 for index in plan.frame_indices], abs=1e-4)


def test_num_frames_of_a_short_clip_gives_all_its_frames(tmp_path: Path) -> None:
    plan = plan_video(make_video(tmp_path / "clip.mp4", frames=3), MediaOptions(num_frames=8), LIMITS)
    assert plan.frame_indices == (0, 1, 2)


@given(total=st.integers(1, 5000), count=st.integers(1, 200))
def test_sample_count_equals_transformers(total: int, count: int) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=25.0, duration=total / 25)
    count = min(count, total)
    expected = default_sample_indices_fn(metadata, num_frames=count)
    assert sample_count(total, count).tolist() == expected.tolist()


@given(
    gaps=st.lists(st.integers(1, 900), min_size=1, max_size=60),
    start=st.integers(0, 50),
    fps=st.sampled_from([0.25, 0.5, 1, 2, 3, 7.5, 24, 29.97, 1000]),
)
def test_fps_samples_the_frame_on_show_at_each_k_over_fps(gaps: list[int], start: int, fps: float) -> None:
    ticks = start + np.cumsum([0, *gaps[:-1]])
    end = (ticks[-1] + gaps[-1]) / 1000
    chosen = sample(ticks / 1000, end, 0.001, MediaOptions(fps=fps), LIMITS).tolist()
    expected, k = set(), 0
    while k == 0 or k / fps < end - 1e-9:
        shown = [i for i, tick in enumerate(ticks) if tick / 1000 - 0.0005 <= k / fps + 1e-9]
        expected.add(shown[-1] if shown else 0)
        k += 1
    assert chosen == sorted(expected)


def test_fps_of_the_source_takes_every_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mkv", rate=30, frames=40)  # Matroska rounds to milliseconds
    assert plan_video(path, MediaOptions(fps=30), LIMITS).frame_indices == tuple(range(40))


def test_variable_frame_rate_goes_by_presentation_time(tmp_path: Path) -> None:
    ticks = [0, 40, 80, 1500, 1540, 1580, 3000, 3040]
    path = make_video(tmp_path / "clip.mkv", frames=8, ticks=ticks)
    plan = plan_video(path, MediaOptions(fps=1), LIMITS)
    assert plan.times_s == pytest.approx([0.0, 0.08, 1.58, 3.0])
    assert_true_frames(path, plan)


def test_the_larger_of_two_streams_is_used(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", size=(32, 32), second=(320, 240))
    plan = plan_video(path, ALL, LIMITS)
    assert (plan.width, plan.height) == (320, 240)
    assert_true_frames(path, plan)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_display_matrix_turns_frames_upright(tmp_path: Path, rotation: int, hflip: bool) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=2, rotation=rotation, hflip=hflip)
    plan = plan_video(path, ALL, LIMITS)
    (_, frame), *_ = decode_frames(path, plan, [0])
    stored_side_by_side = rotation % 180 == 0
    assert (plan.width, plan.height) == ((64, 48) if stored_side_by_side else (48, 64))
    assert frame.shape == (plan.height, plan.width, 3)
    # the white patch is stored upper left; rotation counts counter-clockwise, the flip comes last
    patch = np.zeros((2, 2))
    patch[0, 0] = 1
    turned = np.rot90(patch, rotation // 90)
    expected = turned[:, ::-1] if hflip else turned
    corners = np.array([[frame[2, 2, 0], frame[2, -3, 0]], [frame[-3, 2, 0], frame[-3, -3, 0]]])
    assert (corners > 200).tolist() == (expected > 0).tolist()


def test_frames_after_damage_are_lost_until_the_next_keyframe(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=24, gop=8)
    data = bytearray(path.read_bytes())
    with av.open(path) as container:
        packet = next(
            p for p in container.demux(video=0) if p.pts is not None and round(p.pts * p.time_base * 12) == 10
        )
        assert packet.pos is not None
        start, end = packet.pos, packet.pos + packet.size
    data[start:end] = b"\xff" * (end - start)
    path.write_bytes(data)
    plan = plan_video(path, ALL, LIMITS)
    decoded = dict(decode_frames(path, plan, range(24)))
    assert set(range(24)) - set(decoded) == {10, 11, 12, 13, 14, 15}
    for position, frame in decoded.items():
        assert abs(shade_of(frame) - shade(position)) <= 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_frames_or_our_own_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "clip.mp4"
    broken = tmp_path / "broken.mp4"
    if not path.exists():
        make_video(path, b_frames=1)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = ""
    try:
        plan = plan_video(broken, ALL, LIMITS)
        for position, frame in decode_frames(broken, plan, range(plan.num_frames)):
            assert 0 <= position < plan.num_frames
            assert frame.shape == (plan.height, plan.width, 3)
    except MediaError as error:
        message = error.public_message
    assert "0x" not in message
    assert str(tmp_path) not in message


def test_a_truncated_transport_stream_keeps_its_beginning(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.ts")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    plan = plan_video(path, ALL, LIMITS)
    decoded = dict(decode_frames(path, plan, range(plan.num_frames)))
    assert 8 <= len(decoded) < 24
    for position, frame in decoded.items():
        assert abs(shade_of(frame) - shade(position)) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MediaOptions(num_frames=4, fps=1), "either num_frames or fps"),
        (MediaOptions(num_frames=0), "num_frames of at least 1, but got 0"),
        (MediaOptions(fps=0), "fps above 0"),
        (MediaOptions(fps=float("nan")), "fps above 0"),
        (MediaOptions(fps=float("inf")), "fps above 0"),
    ],
)
def test_impossible_options_are_bad_requests(tmp_path: Path, options: MediaOptions, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        plan_video(tmp_path / "unread.mp4", options, LIMITS)


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        (MediaLimits(max_frames=8), MediaOptions(num_frames=9), "at most 8, but got 9"),
        (MediaLimits(max_frames=8), MediaOptions(fps=12), "at most 8 sampled frames, but got 24"),
        (
            MediaLimits(max_total_pixels=64 * 48 * 4),
            MediaOptions(num_frames=5),
            "pixels over all sampled frames",
        ),
        (MediaLimits(max_source_frames=23), MediaOptions(), "at most 23 frames"),
        (MediaLimits(max_duration_s=1.5), MediaOptions(), "at most 1.5 s, but got 2 s"),
        (MediaLimits(max_pixels=64 * 48 - 1), MediaOptions(), "at most 3071 pixels per frame, but got 64x48"),
        (MediaLimits(max_side=63), MediaOptions(), "at most 63 pixels"),
        (MediaLimits(max_aspect=1.3), MediaOptions(), "aspect ratio of at most 1.3"),
    ],
)
def test_limits_name_themselves_and_what_was_found(
    tmp_path: Path, limits: MediaLimits, options: MediaOptions, message: str
) -> None:
    path = make_video(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match=message):
        plan_video(path, options, limits)


def test_items_exactly_at_the_limits_pass(tmp_path: Path) -> None:
    limits = MediaLimits(
        max_frames=24,
        max_total_pixels=64 * 48 * 24,
        max_source_frames=24,
        max_duration_s=2.1,
        max_pixels=64 * 48,
        max_side=64,
        max_aspect=64 / 48,
    )
    assert plan_video(make_video(tmp_path / "clip.mp4"), MediaOptions(fps=12), limits).num_frames == 24


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", b"ffconcat version 1.0\nfile x"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="not a video"):
        plan_video(path, MediaOptions(), LIMITS)


def test_audio_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        plan_video(path, MediaOptions(), LIMITS)
