"""The generator of clips: repeatable, askable, honest geometry, and real H.264 files."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest

from mmserve.evaluation.clipworld import (
    KINDS,
    SIDE,
    Clip,
    Scene,
    ask_about,
    questions,
    render,
    sample_scene,
    through_codec,
    visible,
    write_mp4,
)
from mmserve.evaluation.drawing import COLOURS, SHAPES
from mmserve.request import MediaOptions


def scenes(topic: str, count: int, frames: int = 8) -> list[Scene]:
    return [sample_scene(np.random.default_rng([1, index]), topic, frames) for index in range(count)]


def difference(one: Clip, other: Clip) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert scenes("order", 3) == scenes("order", 3)
    assert len(set(scenes("order", 20))) == 20


def test_rendering_repeats_to_the_byte_and_leaves_the_seed_alone() -> None:
    scene = scenes("direction", 1)[0]
    clip = render(scene)
    assert clip.shape == (8, SIDE, SIDE, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, render(scene))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [8, 64])
def test_every_kind_can_be_asked(kind: str, frames: int) -> None:
    for index, scene in enumerate(scenes(kind, 60, frames)):
        question = ask_about(np.random.default_rng(index), scene, kind)
        assert question.kind == kind
        assert question.text
        assert question.answer
        assert "{" not in question.text


@pytest.mark.parametrize("kind", ["colour", "shape", "count", "yesno"])
def test_images_can_be_asked_about(kind: str) -> None:
    for index, scene in enumerate(scenes(kind, 30, 1)):
        assert ask_about(np.random.default_rng(index), scene, kind).answer


def test_answers_are_true_of_what_is_visible() -> None:
    """Checked against the ground truth of the frames, not against how the scene was made."""
    for kind in KINDS:
        for index, scene in enumerate(scenes(kind, 40)):
            seen = [{actor.look: (actor.colour, x, y) for actor, x, y in visible(scene, f)} for f in range(8)]
            for question in questions(np.random.default_rng(index), scene):
                looks = [
                    look for look in SHAPES if look in question.text.split() or f"{look}?" in question.text
                ]
                if question.kind == "colour":
                    assert {frame[looks[0]][0] for frame in seen if looks[0] in frame} == {question.answer}
                elif question.kind == "direction":
                    first, last = seen[0][looks[0]], seen[-1][looks[0]]
                    moved = {"right": last[1] - first[1], "down": last[2] - first[2]}
                    moved |= {"left": -moved["right"], "up": -moved["down"]}
                    assert max(moved, key=moved.__getitem__) == question.answer
                    assert moved[question.answer] >= 44
                elif question.kind == "count":
                    assert {len(frame) for frame in seen} == {int(question.answer)}
                elif question.kind == "digit":
                    assert any(question.answer in frame for frame in seen)


def first_seen(scene: Scene, look: str) -> int:
    return next(
        frame
        for frame in range(scene.frames)
        if look in {actor.look for actor, _, _ in visible(scene, frame)}
    )


def test_the_order_is_that_of_the_first_appearances_and_never_both_at_once() -> None:
    for index, scene in enumerate(scenes("order", 60)):
        question = ask_about(np.random.default_rng(index), scene, "order")
        named = [look for look in SHAPES if f"the {look}" in question.text]
        assert len(named) == 2
        assert min(named, key=lambda look: first_seen(scene, look)) == question.answer
        together = [{actor.look for actor, _, _ in visible(scene, frame)} >= set(named) for frame in range(8)]
        assert not any(together)


@pytest.mark.parametrize("frames", [1, 8, 64])
def test_sprites_never_overlap_nor_leave_the_picture(frames: int) -> None:
    for kind in KINDS if frames > 1 else ("colour", "shape", "count", "yesno"):
        for scene in scenes(kind, 40, frames):
            for frame in range(scene.frames):
                boxes = [(x, y, actor.size / 2) for actor, x, y in visible(scene, frame)]
                assert all(
                    half - 1e-6 <= place <= SIDE - half + 1e-6 for x, y, half in boxes for place in (x, y)
                )
                for (x, y, half), (other_x, other_y, other_half) in combinations(boxes, 2):
                    assert max(abs(x - other_x), abs(y - other_y)) >= half + other_half - 1e-6


def test_looks_and_colours_of_a_scene_are_distinct() -> None:
    for kind in KINDS:
        for scene in scenes(kind, 40):
            looks = [actor.look for actor in scene.actors]
            assert len(set(looks)) == len(looks)
            colours = [actor.colour for actor in scene.actors if actor.look in SHAPES]
            assert len(set(colours)) == len(colours)
            assert set(colours) <= set(COLOURS)


def test_a_sprite_is_where_the_ground_truth_says() -> None:
    """The centre of a disc has the disc's colour in the pixels of its frame."""
    checked = 0
    for scene in scenes("direction", 12):
        clip = render(scene)
        for frame in (0, 7):
            for actor, x, y in visible(scene, frame):
                if actor.look in ("circle", "square", "diamond") and scene.shake == 0:
                    pixel = clip[frame, round(y), round(x)].astype(int)
                    assert np.abs(pixel - COLOURS[actor.colour]).max() < 40
                    checked += 1
    assert checked > 5


@pytest.mark.parametrize("fps", [2, 4, 29.97])
def test_files_are_real_h264_that_decode_to_the_same_frames(tmp_path: Path, fps: float) -> None:
    clip = render(scenes("direction", 1)[0])
    path = tmp_path / "clip.mp4"
    write_mp4(clip, path, fps)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height) == (SIDE, SIDE)
        assert float(stream.average_rate or 0) == pytest.approx(fps, rel=1e-3)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 8
    assert difference(np.stack(frames), clip) < 6


def test_the_projects_own_reader_takes_every_frame(tmp_path: Path) -> None:
    from mmserve.media.limits import MediaLimits
    from mmserve.media.video import decode_frames, plan_video

    clip = render(scenes("cuts", 1)[0])
    path = tmp_path / "clip.mp4"
    write_mp4(clip, path)
    plan = plan_video(path, MediaOptions(num_frames=64), MediaLimits())
    assert plan.times_s == tuple(index / 4 for index in range(8))
    frames = [frame for _, frame in decode_frames(path, plan, range(8))]
    assert difference(np.stack(frames), clip) < 6


def test_quality_follows_the_rate_factor() -> None:
    clip = render(scenes("count", 1)[0])
    assert difference(through_codec(clip, 12), clip) < difference(through_codec(clip, 40), clip)
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer in buffers:
        write_mp4(clip, buffer)
    assert buffers[0].getvalue() == buffers[1].getvalue()
