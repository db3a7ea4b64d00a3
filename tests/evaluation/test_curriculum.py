"""What `tiny` practises: scenes cut short stay true, rows are askable, labels are what is visible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmserve.evaluation.clipworld import Scene, questions, sample_scene, visible
from mmserve.evaluation.curriculum import (
    LOCAL,
    SUMMARY,
    TEMPORAL,
    Lesson,
    Seen,
    askable,
    frame_labels,
    image_row,
    make_scene,
    mixed_row,
    moment,
    still_row,
    stream_row,
    summary_labels,
    under_tokens,
    until,
    video_row,
)
from mmserve.evaluation.drawing import COLOURS, SHAPES
from mmserve.evaluation.suites import stream_question, stream_scene
from mmserve.evaluation.tiny_model import build_tokenizer
from mmserve.evaluation.tiny_rows import TinyTokenizer
from mmserve.pruning.holitom import HoliTom

WORDS = TinyTokenizer(build_tokenizer())


def scene(topic: str, index: int, frames: int = 8) -> Scene:
    return sample_scene(np.random.default_rng([3, index]), topic, frames)


def seen(made: Scene) -> Seen:
    shape = (144, 4) if made.frames == 1 else (made.frames, 36, 4)
    tokens = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return Seen(made, tokens, tokens[..., 0])


@pytest.mark.parametrize("lesson", ["first", "clip", "image", "varied", "stream"])
def test_a_training_scene_is_a_function_of_seed_and_index(lesson: Lesson) -> None:
    one, clip = make_scene(0, lesson, 5)
    again, same = make_scene(0, lesson, 5)
    assert one == again
    assert np.array_equal(clip, same)
    assert len(clip) == one.frames
    assert make_scene(0, lesson, 6)[0] != one


def test_a_scene_cut_short_shows_the_same_frames() -> None:
    for index in range(20):
        whole = scene("order", index, 16)
        short = until(whole, 9)
        assert short.frames == 9
        for frame in range(9):
            places = [(actor.look, x, y) for actor, x, y in visible(whole, frame)]
            assert [(actor.look, x, y) for actor, x, y in visible(short, frame)] == places


def test_a_moment_is_what_one_frame_shows() -> None:
    whole = scene("direction", 1)
    (still,) = [moment(whole, 5)]
    assert [(a.look, x, y) for a, x, y in visible(still, 0)] == [
        (a.look, x, y) for a, x, y in visible(whole, 5)
    ]
    assert not {q.kind for q in questions(np.random.default_rng(0), still)} & {"direction", "cuts", "order"}


def test_a_direction_is_not_asked_before_anything_has_moved() -> None:
    for index in range(20):
        early = until(scene("direction", index, 64), 3)
        asked = askable(np.random.default_rng(index), early, 8)
        assert asked
        assert "direction" not in {question.kind for question in asked}


def test_a_stream_remembers_nothing_before_its_second_object() -> None:
    rng = np.random.default_rng(0)
    scene = stream_scene(rng)
    assert stream_question(rng, scene, 1, "past") is None
    now = stream_question(rng, scene, 1, "now")
    assert now is not None
    assert now.answer == scene.actors[0].look
    last = stream_question(rng, scene, scene.frames, "now")
    assert last is not None
    assert last.answer == scene.actors[-1].look


@pytest.mark.parametrize("carriers", [False, True])
def test_rows_of_every_kind(carriers: bool) -> None:
    rng = np.random.default_rng(0)
    clip, image = seen(scene("colour", 0)), seen(scene("count", 1, 1))
    rows = [
        video_row(rng, WORDS, clip, carriers=carriers, views=3, most=8),
        still_row(rng, WORDS, Seen(moment(clip.scene, 0), clip.tokens[:1]), carriers=carriers),
        stream_row(rng, WORDS, seen(stream_scene(rng)), carriers=carriers, moments=4),
        mixed_row(rng, WORDS, [clip, image, clip], carriers=carriers, most=2),
        image_row(rng, WORDS, image),
    ]
    for row in rows:
        assert len(row.tokens) == len(row.positions) == len(row.frame) + len(row.branch)
        assert torch.equal(row.tokens[row.asked_at + 1], row.wanted)
        assert (row.sees <= len(row.frame)).all()
        assert len(row.visual) == len(row.visual_at)
    assert rows[3].item.unique().tolist() == [-1, 0, 1, 2]


def test_rows_whose_media_have_lost_tokens() -> None:
    rng, pruner = np.random.default_rng(0), HoliTom(keep=0.25)
    clip, image = seen(scene("colour", 0, 64)), seen(scene("count", 1, 1))
    rows = [
        video_row(rng, WORDS, clip, carriers=False, views=1, most=8, pruner=pruner),
        mixed_row(rng, WORDS, [clip, image], carriers=False, most=2, pruner=pruner),
        image_row(rng, WORDS, image, pruner),
    ]
    for row in rows:
        assert 0 < len(row.visual) == len(row.visual_at) < len(row.positions)
        assert int(row.positions.max()) >= 4 * len(row.visual)


def test_the_word_that_names_an_object_is_found() -> None:
    rng = np.random.default_rng(0)
    row = video_row(rng, WORDS, seen(scene("colour", 0)), carriers=False, views=1, most=20)
    asked = {kind for kind, _, _ in row.kinds}
    assert asked & {"colour", "shape"}
    decoded = [WORDS.ids(f" {word}")[0] for word in (*SHAPES, *COLOURS)]
    assert len(row.named_at) > 0
    assert set(row.tokens[row.named_at].tolist()) <= set(decoded)


def test_labels_say_what_a_frame_shows_and_what_has_happened() -> None:
    for index in range(10):
        made = scene("cuts", index, 12)
        local, temporal = frame_labels(made)
        assert local.shape == (12, len(LOCAL))
        assert temporal.shape == (12, len(TEMPORAL))
        assert temporal[-1, -1] == len(made.cuts)
        for frame in range(12):
            shown = {actor.look: actor.colour for actor, _, _ in visible(made, frame)}
            for slot, shape in enumerate(SHAPES):
                wanted = 1 + list(COLOURS).index(shown[shape]) if shape in shown else 0
                assert local[frame, slot] == wanted
        for labels, sizes in ((local, LOCAL), (temporal, TEMPORAL)):
            assert (labels < torch.tensor(sizes)).all()


def test_a_summary_answers_every_question() -> None:
    for index, topic in enumerate(("direction", "order", "cuts", "digit", "count") * 4):
        made = scene(topic, index)
        labels = summary_labels(made).tolist()
        assert len(labels) == len(SUMMARY)
        size = len(SHAPES)
        colours, ways, turns, (digit, cuts, steady) = (
            labels[:size],
            labels[size : 2 * size],
            labels[2 * size : 3 * size],
            labels[-3:],
        )
        for question in questions(np.random.default_rng(0), made):
            named = [slot for slot, look in enumerate(SHAPES) if f" {look}" in question.text]
            if question.kind == "colour":
                assert list(COLOURS)[colours[named[0]] - 1] == question.answer
            if question.kind == "direction" and ways[named[0]] >= 0:
                assert ("left", "right", "up", "down")[ways[named[0]] - 1] == question.answer
            if question.kind == "order":
                assert turns[SHAPES.index(question.answer)] == 1
            if question.kind in ("digit", "cuts", "count"):
                known = {"digit": digit - 1, "cuts": cuts, "count": steady}
                assert str(known[question.kind]) == question.answer


def test_what_lies_under_tokens() -> None:
    moving = scene("direction", 0)
    ways, centres = under_tokens(moving, 6)
    assert len(ways) == len(centres) == 8 * 36
    expected = {
        1 + ("left", "right", "up", "down").index(actor.direction) if actor.direction else 0
        for actor in moving.actors
        if actor.look in SHAPES
    }
    assert set(ways.tolist()) - {-100, 0} == expected - {0}
    for frame in (0, 7):
        at = slice(frame * 36, (frame + 1) * 36)
        assert int((centres[at] == 1).sum()) == len(visible(moving, frame))
    assert set(ways[:36].tolist()) <= {-100, 0}  # nothing has moved in the first frame
