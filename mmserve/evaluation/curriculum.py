"""What `tiny` practises: scenes of every kind, and the rows asked about them.

Scenes are functions of (seed, lesson, index); rows draw their wording from a generator of their own.
Training scenes never share a random stream with the held-out suites. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmserve.evaluation.clipworld import (
    DIRECTIONS,
    KINDS,
    SIDE,
    Clip,
    Question,
    Scene,
    questions,
    render,
    sample_scene,
    through_codec,
    visible,
)
from mmserve.evaluation.drawing import COLOURS, SHAPES
from mmserve.evaluation.suites import stream_question, stream_scene
from mmserve.evaluation.tiny_data import TRAIN_STREAM, training_questions
from mmserve.evaluation.tiny_rows import Row, RowBuilder, TinyTokenizer
from mmserve.pruning.base import Pruner

Lesson = Literal["first", "clip", "image", "varied", "long", "stream"]
LESSONS: dict[Lesson, int] = {"first": 10, "clip": 11, "image": 12, "varied": 13, "long": 14, "stream": 15}
_FIRST_SHARES = [0.04, 0.04, 0.16, 0.18, 0.22, 0.18, 0.12, 0.06]  # of KINDS
_CLIP_SHARES = [0.03, 0.03, 0.14, 0.28, 0.12, 0.14, 0.23, 0.03]
_LONG_SHARES = [0.06, 0.02, 0.04, 0.16, 0.44, 0.14, 0.14, 0.0]
MIXED_KINDS = ("colour", "shape", "count", "direction")
MOVED = 24.0  # pixels after which a direction can be asked about
GAP = 3000  # positions that a video's frames may have leapt over


class Seen(NamedTuple):
    """A scene and what the tower made of it: [T, 36, D], or [144, D] of an image.

    Only rows with a pruner need the saliency of its tokens.
    """

    scene: Scene
    tokens: Tensor
    saliency: Tensor | None = None


def make_scene(seed: int, lesson: Lesson, index: int) -> tuple[Scene, Clip]:
    """Training item `index` of a lesson, half of the clips as they come back from H.264."""
    rng = np.random.default_rng([seed, TRAIN_STREAM, LESSONS[lesson], index])
    scene = _sample(rng, lesson)
    clip = render(scene)
    if lesson == "image" or rng.random() < 0.4:
        return scene, clip
    return scene, through_codec(clip, int(rng.integers(12, 30)))


def _sample(rng: np.random.Generator, lesson: Lesson) -> Scene:
    if lesson == "stream":
        return stream_scene(rng)
    if lesson == "image":
        return sample_scene(rng, str(rng.choice(["colour", "shape", "count"], p=[0.2, 0.2, 0.6])), 1)
    if lesson == "first":
        # what flashes for longer is easier to find: the long flashes teach the short ones
        return sample_scene(rng, str(rng.choice(KINDS, p=_FIRST_SHARES)), 8, int(rng.choice([2, 2, 4, 8])))
    if lesson == "clip":
        return sample_scene(rng, str(rng.choice(KINDS, p=_CLIP_SHARES)), 8, int(rng.choice([2, 2, 4])))
    frames = 64 if lesson == "long" else int(rng.integers(1, 33))
    topics: tuple[str, ...] = KINDS
    shares = np.array(_LONG_SHARES if lesson == "long" else _CLIP_SHARES)
    if frames < 4:
        topics, shares = ("colour", "shape", "count", "yesno"), np.full(4, 0.25)
    topic = str(rng.choice(topics, p=shares / shares.sum()))
    longest = int(rng.choice([1, 1, 2])) if topic == "digit" else int(rng.integers(1, 5))
    return sample_scene(rng, topic, frames, max(1, min(longest, frames // 2)))


def until(scene: Scene, frames: int) -> Scene:
    """The scene as it is after its first `frames` frames."""
    return replace(
        scene,
        frames=frames,
        actors=tuple(
            replace(actor, stop=min(actor.stop, frames)) for actor in scene.actors if actor.start < frames
        ),
        cuts=tuple(cut for cut in scene.cuts if cut < frames),
    )


def moment(scene: Scene, frame: int) -> Scene:
    """What one frame shows, as a scene of one frame."""
    shown = [(actor, place) for actor in scene.actors if (place := actor.at(frame)) is not None]
    return replace(
        scene,
        frames=1,
        cuts=(),
        actors=tuple(
            replace(actor, x=place[0], y=place[1], vx=0.0, vy=0.0, start=0, stop=1, flash=False)
            for actor, place in shown
        ),
    )


def askable(rng: np.random.Generator, scene: Scene, most: int) -> list[Question]:
    """Questions about a scene, without directions of what has hardly moved."""
    slow = {
        actor.look for actor in scene.actors if max(abs(actor.vx), abs(actor.vy)) * (scene.frames - 1) < MOVED
    }
    asked = training_questions(rng, scene, most)
    return [
        question
        for question in asked
        if question.kind != "direction" or not any(f" {look} " in f"{question.text} " for look in slow)
    ]


def _dialogues(rng: np.random.Generator, asked: Sequence[Question]) -> list[list[Question]]:
    """A fifth of the questions in a row as turns of one dialogue, the others alone."""
    turns: list[list[Question]] = []
    for question in asked:
        if turns and len(turns[-1]) < 4 and question.kind != "caption" and rng.random() < 0.2:
            turns[-1].append(question)
        else:
            turns.append([question])
    return turns


def video_row(
    rng: np.random.Generator,
    tokenizer: TinyTokenizer,
    seen: Seen,
    *,
    carriers: bool,
    views: int,
    most: int,
    pruner: Pruner | None = None,
) -> Row:
    """One video, asked about at its end and, with more `views`, after some of its frames.

    Half of the long ones end early, which spares compute and moves what is last.
    """
    assert pruner is None or views == 1, "what a pruner leaves is of the whole video"
    scene, tokens, saliency = seen
    if scene.frames > 32 and rng.random() < 0.5:
        scene = until(scene, int(rng.integers(20, scene.frames)))
        tokens = tokens[: scene.frames]
        saliency = saliency if saliency is None else saliency[: scene.frames]
    builder = RowBuilder(tokenizer, carriers, pruner)
    builder.text("<|im_start|>user\n")
    leaps = rng.random() < 0.15
    builder.video(
        tokens,
        newline=False,
        gap_before=int(rng.integers(scene.frames)) if leaps else -1,
        gap=int(rng.integers(GAP)) if leaps else 0,
        saliency=saliency,
    )
    for view in range(views):
        frames = scene.frames if view == 0 else int(rng.integers(1, scene.frames + 1))
        asked = askable(rng, until(scene, frames), most)
        for turns in _dialogues(rng, asked):
            builder.branch(turns, frames)
    return builder.row()


def still_row(rng: np.random.Generator, tokenizer: TinyTokenizer, seen: Seen, *, carriers: bool) -> Row:
    """A video of one frame, asked everything in two wordings: reading one carrier takes practice."""
    builder = RowBuilder(tokenizer, carriers)
    builder.text("<|im_start|>user\n")
    builder.video(seen.tokens, newline=False)
    for question in dict.fromkeys(questions(rng, seen.scene) + questions(rng, seen.scene)):
        builder.branch([question], 1)
    return builder.row()


def stream_row(
    rng: np.random.Generator, tokenizer: TinyTokenizer, seen: Seen, *, carriers: bool, moments: int
) -> Row:
    """A stream, asked at several moments about what is there and what was there."""
    scene = seen.scene
    builder = RowBuilder(tokenizer, carriers)
    builder.text("<|im_start|>user\n")
    leaps = rng.random() < 0.3
    builder.video(
        seen.tokens,
        newline=False,
        gap_before=int(rng.integers(scene.frames // 2)) if leaps else -1,
        gap=int(rng.integers(GAP)) if leaps else 0,
    )
    for frames in np.sort(rng.choice(np.arange(1, scene.frames + 1), moments, replace=False)).tolist():
        asked = [stream_question(rng, scene, frames, "now")]
        past = stream_question(rng, scene, frames, "past")
        asked += [past] if past is not None else []
        rng.shuffle(asked)
        for turns in _dialogues(rng, [question for question in asked if question is not None]):
            builder.branch(turns, frames)
    return builder.row()


def mixed_row(
    rng: np.random.Generator,
    tokenizer: TinyTokenizer,
    items: Sequence[Seen],
    *,
    carriers: bool,
    most: int,
    pruner: Pruner | None = None,
) -> Row:
    """Several items with text between, each asked about; an earlier turn may stand between two of them."""
    builder = RowBuilder(tokenizer, carriers, pruner)
    images = sum(seen.tokens.dim() == 2 for seen in items)
    turn_after = int(rng.integers(len(items))) if rng.random() < 0.25 else -1
    text = "<|im_start|>user\n"
    for number, seen in enumerate(items):
        builder.text(f"{text}Item {number + 1}:")
        if seen.tokens.dim() == 2:
            builder.image(seen.tokens, alone=images == 1, saliency=seen.saliency)
        else:
            builder.video(seen.tokens, newline=True, saliency=seen.saliency)
        text = "\n"
        if number == turn_after and number + 1 < len(items):
            asked = _about(rng, items, int(rng.integers(number + 1)), 1)
            if asked:
                text = f"\n{asked[0].text}<|im_end|>\n<|im_start|>assistant\n{asked[0].answer}<|im_end|>\n"
                text += "<|im_start|>user\n"
    collected = [question for number in range(len(items)) for question in _about(rng, items, number, most)]
    for turns in _dialogues(rng, collected):
        builder.branch(turns)
    return builder.row()


def image_row(
    rng: np.random.Generator, tokenizer: TinyTokenizer, seen: Seen, pruner: Pruner | None = None
) -> Row:
    """One picture by itself."""
    builder = RowBuilder(tokenizer, carriers=False, pruner=pruner)
    builder.text("<|im_start|>user\n")
    builder.image(seen.tokens, alone=True, saliency=seen.saliency)
    for turns in _dialogues(rng, askable(rng, seen.scene, 8)):
        builder.branch(turns)
    return builder.row()


def _about(rng: np.random.Generator, items: Sequence[Seen], number: int, most: int) -> list[Question]:
    asked = [question for question in questions(rng, items[number].scene) if question.kind in MIXED_KINDS]
    rng.shuffle(asked)
    asked.sort(key=lambda question: question.kind not in ("count", "direction"))
    return [
        Question(question.kind, f"In item {number + 1}: {question.text}", question.answer)
        for question in asked[:most]
    ]


# what each frame's last token should know: small classifications, -100 where there is nothing to know

LOCAL = (*[len(COLOURS) + 1] * len(SHAPES), 11, 7)  # colour of each shape, digit, objects in sight
TEMPORAL = (*[len(DIRECTIONS) + 1] * len(SHAPES), 11, 5)  # ways of the shapes, digit so far, cuts so far


def frame_labels(scene: Scene) -> tuple[Tensor, Tensor]:
    """Classes of LOCAL [T, 10] and TEMPORAL [T, 10] per frame."""
    local = torch.zeros(scene.frames, len(LOCAL), dtype=torch.long)
    temporal = torch.zeros(scene.frames, len(TEMPORAL), dtype=torch.long)
    ways, colours = list(DIRECTIONS), list(COLOURS)
    digit = 0
    for frame in range(scene.frames):
        in_sight = visible(scene, frame)
        shown = 0
        for actor, _, _ in in_sight:
            if actor.look in SHAPES:
                slot = SHAPES.index(actor.look)
                local[frame, slot] = 1 + colours.index(actor.colour)
                moved = max(abs(actor.vx), abs(actor.vy)) * frame
                if actor.direction is not None:
                    temporal[frame, slot] = 1 + ways.index(actor.direction) if moved >= MOVED / 2 else -100
            else:
                shown = digit = 1 + int(actor.look)
        local[frame, -2], local[frame, -1] = shown, min(len(in_sight), 6)
        temporal[frame, -2] = digit
        temporal[frame, -1] = min(sum(cut <= frame for cut in scene.cuts), 4)
    return local, temporal


# what the newline after an item should know about all of it: colour, way and turn to flash of each shape,
# digit, cuts, objects that rest or move
SUMMARY = (
    *[len(COLOURS) + 1] * len(SHAPES),
    *[len(DIRECTIONS) + 1] * len(SHAPES),
    *[3] * len(SHAPES),
    11,
    5,
    7,
)


def summary_labels(scene: Scene) -> Tensor:
    """Classes of SUMMARY, int64 [27]."""
    colours, ways, turns = ([0] * len(SHAPES) for _ in range(3))
    flashes = sorted((actor for actor in scene.actors if actor.flash), key=lambda actor: actor.start)
    order = [actor.look for actor in flashes if actor.look in SHAPES]
    digit = steady = 0
    for actor in scene.actors:
        if actor.look not in SHAPES:
            digit = 1 + int(actor.look)
            continue
        slot = SHAPES.index(actor.look)
        colours[slot] = 1 + list(COLOURS).index(actor.colour)
        steady += not actor.flash
        if actor.look in order:
            turns[slot] = min(1 + order.index(actor.look), 2)
        if actor.direction is not None:
            moved = max(abs(actor.vx), abs(actor.vy)) * (scene.frames - 1)
            ways[slot] = 1 + list(DIRECTIONS).index(actor.direction) if moved >= MOVED else -100
    return torch.tensor([*colours, *ways, *turns, digit, min(len(scene.cuts), 4), min(steady, 6)])


def under_tokens(scene: Scene, side: int) -> tuple[Tensor, Tensor]:
    """Of each token of every frame, `side` tokens wide: the way of the object under it (0 rests), and
    whether the object's centre is there; int64 [T * side * side], -100 where nothing is or it is too early.
    """
    cell = SIDE / side
    reach = (np.arange(side) + 0.5) * cell
    ways = np.full((scene.frames, side, side), -100)
    centres = ways.copy()
    for frame in range(scene.frames):
        for actor, x, y in visible(scene, frame):
            half = actor.size / 2
            inside = (np.abs(y - reach) < half)[:, None] & (np.abs(x - reach) < half)[None, :]
            moved = max(abs(actor.vx), abs(actor.vy)) * frame
            way = 0 if actor.direction is None else 1 + list(DIRECTIONS).index(actor.direction)
            ways[frame][inside] = way if way == 0 or moved >= MOVED / 2 else -100
            centres[frame][inside] = 0
            row, column = (min(max(int(at // cell), 0), side - 1) for at in (y, x))
            centres[frame, row, column] = 1
    return torch.from_numpy(ways.reshape(-1)), torch.from_numpy(centres.reshape(-1))
