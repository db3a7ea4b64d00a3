"""The held-out suites: repeatable, apart from training, and not answerable without the video."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mmserve.batch.questions import read_questions
from mmserve.errors import BadRequest
from mmserve.evaluation.clipworld import SIDE, Scene, visible
from mmserve.evaluation.drawing import SHAPES
from mmserve.evaluation.suites import SUITES, Example, Media, examples, write_suite

FITTED, TESTED = 1200, 400


@cache
def sample(suite: str, seed: int = 0) -> tuple[Example, ...]:
    return tuple(islice(examples(suite, seed), FITTED + TESTED))


@pytest.mark.parametrize("suite", SUITES)
def test_an_example_depends_on_suite_seed_and_number_alone(suite: str) -> None:
    again = list(islice(examples(suite, 0), 30))
    assert again == list(sample(suite)[:30])
    others = set(map(scene_seed, islice(examples(suite, 1), 30)))
    assert not others & set(map(scene_seed, again))
    assert len({example.example_id for example in again}) == 30


def scene_seed(example: Example) -> int:
    return example.media[0].scene.seed


def test_suites_and_training_never_share_a_scene() -> None:
    """Same seed, same index: the streams stay apart."""
    from mmserve.evaluation import curriculum, tiny_data

    trained = {tiny_data.make_clip(0, index, 8)[0] for index in range(4)}
    trained |= {curriculum.make_scene(0, "stream", index)[0] for index in range(2)}
    held_out = {media.scene for suite in SUITES for example in sample(suite)[:200] for media in example.media}
    assert not trained & held_out
    assert not {scene.seed for scene in trained} & {scene.seed for scene in held_out}
    assert tiny_data.TRAIN_STREAM not in (101, 102, 103, 104)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(BadRequest, match="clipworld-basic"):
        next(examples("clipworld"))


def test_kinds_of_each_suite() -> None:
    kinds = {suite: {example.question.kind for example in sample(suite)} for suite in SUITES}
    assert kinds["clipworld-basic"] == {
        "colour", "shape", "count", "direction", "digit", "order", "cuts", "yesno"
    }  # fmt: skip
    assert kinds["clipworld-long"] == {"needle", "order", "direction", "cuts", "colour"}
    assert kinds["clipworld-mixed"] == {"colour", "shape", "count", "direction"}
    assert kinds["clipworld-stream"] == {"now", "past"}


def test_a_needle_is_one_frame_of_64_at_any_depth() -> None:
    needles = [example for example in sample("clipworld-long") if example.question.kind == "needle"]
    depths = [example.depth for example in needles if example.depth is not None]
    assert len(depths) == len(needles)
    assert np.histogram(depths, 4, (0, 1))[0].min() > len(needles) / 8
    for example in needles[:50]:
        scene = example.media[0].scene
        shown = [actor for actor in scene.actors if actor.look not in SHAPES]
        assert scene.frames == 64
        assert [actor.stop - actor.start for actor in shown] == [1]


def test_a_stream_is_asked_about_what_was_seen_by_then() -> None:
    for example in sample("clipworld-stream")[:200]:
        scene, fps = example.media[0].scene, example.media[0].fps
        assert example.asked_at_s is not None
        last = round(example.asked_at_s * fps) - 1  # the last frame shown before that moment
        (now,) = [actor for actor, _, _ in visible(scene, last)]
        before = {actor.look: actor.colour for frame in range(last) for actor, _, _ in visible(scene, frame)}
        if example.question.kind == "now":
            assert now.look == example.question.answer
        else:
            look = example.question.text.removesuffix("?").split()[-1]
            assert before[look] == example.question.answer


# a suite must need its video


class View(NamedTuple):
    """What a guesser may look at."""

    example: Example
    scene: Scene
    frame: int


Feature = Callable[[View], Hashable]


def accuracy(views: Sequence[View], feature: Feature) -> float:
    """Of a table from what is seen to the commonest answer, fitted on other samples."""
    table: dict[Hashable, Counter[str]] = defaultdict(Counter)
    kinds: dict[Hashable, Counter[str]] = defaultdict(Counter)
    fitted = int(len(views) * FITTED / (FITTED + TESTED))
    for view in views[:fitted]:
        answer = view.example.question.answer
        table[feature(view)][answer] += 1
        kinds[view.example.question.kind][answer] += 1
    right = 0
    for view in views[fitted:]:
        known = table.get(feature(view)) or kinds[view.example.question.kind]
        right += known.most_common(1)[0][0] == view.example.question.answer
    return right / len(views[fitted:])


def views(suite: str, kind: str | None = None) -> list[View]:
    """Each example with a random frame of the clip it is about."""
    rng = np.random.default_rng(0)
    seen = []
    for example in sample(suite):
        media = asked_about(example)
        frame = int(rng.integers(media.scene.frames))
        if kind in (None, example.question.kind):
            seen.append(View(example, media.scene, frame))
    return seen


def asked_about(example: Example) -> Media:
    text = example.parts[-1]
    assert isinstance(text, str)
    if not text.startswith("In item "):
        return example.media[0]
    return example.media[int(text.removeprefix("In item ").partition(":")[0]) - 1]


def question_text(view: View) -> Hashable:
    return view.example.question.text


def kind_alone(view: View) -> Hashable:
    return view.example.question.kind


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("feature", [question_text, kind_alone])
def test_blind_guessing_is_right_at_most_two_times_in_five(suite: str, feature: Feature) -> None:
    assert accuracy(views(suite), feature) <= 0.40


def named(view: View) -> list[str]:
    words = view.example.question.text.replace("?", " ").replace(",", " ").split()
    return [word for word in words if word in SHAPES]


def place_of_the_mover(view: View) -> Hashable:
    """Where the asked-about sprite is, roughly, and on which axis its centre is exact: lanes are centred."""
    (look,) = named(view)
    x, y, size = next(
        (x, y, actor.size) for actor, x, y in visible(view.scene, view.frame) if actor.look == look
    )
    lanes = [(lanes, axis) for lanes in (2, 3) for axis, c in enumerate((x, y)) if centred(c, SIDE / lanes)]
    return int(x // 18), int(y // 18), size // 16, tuple(axis for _, axis in lanes)


def centred(place: float, cell: float) -> bool:
    return abs(place % cell - cell / 2) < 0.75


def axis_of_the_mover(view: View) -> Hashable:
    """Coarser: the axis, and in which third of the way it is."""
    features = place_of_the_mover(view)
    assert isinstance(features, tuple)
    return features[3], features[0] // 3, features[1] // 3


def flashes_in_sight(view: View) -> Hashable:
    """Which of the two is in sight, by its place in the question, so that the table can learn."""
    looks = [actor.look for actor, _, _ in visible(view.scene, view.frame)]
    return tuple(look in looks for look in named(view))


@pytest.mark.parametrize("suite", ["clipworld-basic", "clipworld-long", "clipworld-mixed"])
@pytest.mark.parametrize("feature", [place_of_the_mover, axis_of_the_mover])
def test_one_frame_does_not_tell_the_direction(suite: str, feature: Feature) -> None:
    assert accuracy(views(suite, "direction"), feature) <= 0.60


@pytest.mark.parametrize("suite", ["clipworld-basic", "clipworld-long"])
def test_one_frame_does_not_tell_the_order(suite: str) -> None:
    """The answer is scored as "the first named" or "the second named"."""
    seen = views(suite, "order")
    table: dict[Hashable, Counter[int]] = defaultdict(Counter)
    half = len(seen) // 2
    for view in seen[:half]:
        table[flashes_in_sight(view)][named(view).index(view.example.question.answer)] += 1
    right = 0
    for view in seen[half:]:
        guess = table[flashes_in_sight(view)].most_common(1) or [(0, 0)]
        right += named(view)[guess[0][0]] == view.example.question.answer
    assert right / (len(seen) - half) <= 0.60


def test_one_frame_does_not_find_the_needle() -> None:
    """An oracle that reads any digit in sight, and otherwise guesses the commonest."""
    seen = views("clipworld-long", "needle")

    def digit(view: View) -> Hashable:
        looks = [actor.look for actor, _, _ in visible(view.scene, view.frame) if actor.look not in SHAPES]
        return looks[0] if looks else None

    assert accuracy(seen, digit) <= 0.60


# files


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_written_as_questions_with_media(tmp_path: Path, suite: str) -> None:
    count = 2 if suite == "clipworld-long" else 4
    file = write_suite(suite, tmp_path / "new", count)
    asked = read_questions(file)
    assert [question.problem for question in asked] == [None] * count
    for question, example in zip(asked, examples(suite), strict=False):
        assert question.question_id == example.example_id
        assert question.answer == example.question.answer
        assert question.meta["kind"] == example.question.kind
        assert len(question.media) == len(example.media)
        assert (question.span is not None) == (suite == "clipworld-stream")


def test_the_same_suite_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_suite("clipworld-mixed", tmp_path / name, 2, seed=3)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    meta = json.loads((tmp_path / "one" / "questions.jsonl").read_text().splitlines()[0])["meta"]
    assert meta["seed"] == 3
