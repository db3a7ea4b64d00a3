"""Held-out ClipWorld suites: seeded, unlimited, written as real mp4 and png files on request.

`clipworld-basic` is 8-frame clips; `clipworld-long` 64 frames with needles; `clipworld-mixed`
several images and clips between text; `clipworld-stream` timed events asked about at a moment.
Knows nothing about models or scoring runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mmserve.errors import BadRequest
from mmserve.evaluation.clipworld import (
    FPS,
    KINDS,
    Actor,
    Clip,
    Question,
    Scene,
    ask_about,
    render,
    sample_scene,
    through_codec,
    write_mp4,
)
from mmserve.evaluation.drawing import COLOURS, SHAPES

STREAM_FPS = 2


@dataclass(frozen=True, slots=True)
class Media:
    """A clip, or an image when it has one frame; `fps` is 0 for images."""

    scene: Scene
    fps: float = FPS

    @property
    def modality(self) -> Literal["image", "video"]:
        return "video" if self.fps else "image"

    def frames(self) -> Clip:
        return render(self.scene)


@dataclass(frozen=True, slots=True)
class Example:
    """One question: `parts` are texts and media in prompt order, the question's text last.

    `depth` (0 to 1) says when in the clip the decisive moment is, None where there is none;
    `asked_at_s` limits a stream to what was seen by then.
    """

    example_id: str
    parts: tuple[str | Media, ...]
    question: Question
    depth: float | None = None
    asked_at_s: float | None = None

    @property
    def media(self) -> list[Media]:
        return [part for part in self.parts if isinstance(part, Media)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a suite's question was answered rightly."""

    kind: str
    frames: int  # of its videos that it may use
    depth: float | None
    right: bool


def _basic(rng: np.random.Generator, index: int, name: str) -> Example:
    topic = KINDS[index % len(KINDS)]
    scene = sample_scene(rng, topic)
    question = ask_about(rng, scene, topic)
    return Example(name, (Media(scene), question.text), question)


def _long(rng: np.random.Generator, index: int, name: str) -> Example:
    topic = ("digit", "order", "direction", "cuts", "digit", "colour")[index % 6]
    scene = sample_scene(rng, topic, 64, flash_frames=1 if topic == "digit" else 4)
    question = ask_about(rng, scene, topic)
    depth = None
    if topic == "digit":
        shown = next(actor for actor in scene.actors if actor.look not in SHAPES)
        question = Question("needle", question.text, question.answer)
        depth = shown.start / scene.frames
    return Example(name, (Media(scene), question.text), question, depth)


def _mixed(rng: np.random.Generator, index: int, name: str) -> Example:
    count = int(rng.integers(2, 7))
    chosen = int(rng.integers(count))
    topic = ("colour", "shape", "count", "direction")[index % 4]
    parts: list[str | Media] = []
    question = Question(topic, "", "")
    for number in range(count):
        is_clip = topic == "direction" if number == chosen else bool(rng.random() < 0.5)
        about = topic if number == chosen else str(rng.choice(["colour", "count"]))
        scene = sample_scene(rng, about, 8 if is_clip else 1)
        parts += [f"Item {number + 1}:", Media(scene, FPS if is_clip else 0)]
        if number == chosen:
            question = ask_about(rng, scene, topic)
    text = f"In item {chosen + 1}: {question.text}"
    return Example(name, (*parts, text), Question(topic, text, question.answer))


def stream_scene(rng: np.random.Generator) -> Scene:
    """One object at a time, each for 4 to 8 frames."""
    count = int(rng.integers(3, 7))
    looks, colours = rng.permutation(SHAPES)[:count], rng.permutation(list(COLOURS))[:count]
    bounds = np.concatenate([[0], np.cumsum(rng.integers(4, 9, count))])
    actors = tuple(
        Actor(
            look=str(looks[i]),
            colour=str(colours[i]),
            size=56,
            x=float(rng.uniform(0, 88)),
            y=float(rng.uniform(0, 88)),
            start=int(bounds[i]),
            stop=int(bounds[i + 1]),
        )
        for i in range(count)
    )
    return Scene(frames=int(bounds[-1]), actors=actors, noise=3.0, seed=int(rng.integers(2**62)))


def stream_question(
    rng: np.random.Generator, scene: Scene, frames: int, kind: Literal["now", "past"]
) -> Question | None:
    """What can be asked once `frames` frames of a stream were seen; None where nothing is past."""
    seen = [actor for actor in scene.actors if actor.start < frames]
    if kind == "now":
        return Question(kind, "What shape is the object now?", seen[-1].look)
    if len(seen) < 2:
        return None
    earlier = seen[int(rng.integers(len(seen) - 1))]
    return Question(kind, f"What colour was the {earlier.look}?", earlier.colour)


def _stream(rng: np.random.Generator, index: int, name: str) -> Example:
    """Asked about what is there now, or was there before."""
    scene = stream_scene(rng)
    current = scene.actors[int(rng.integers(1, len(scene.actors)))]
    frame = int(rng.integers(current.start + 1, current.stop))
    question = stream_question(rng, scene, frame, "now" if index % 2 == 0 else "past")
    assert question is not None, "another object came before the current one"
    return Example(name, (Media(scene, STREAM_FPS), question.text), question, asked_at_s=frame / STREAM_FPS)


_BUILDERS: dict[str, tuple[int, Callable[[np.random.Generator, int, str], Example]]] = {
    "clipworld-basic": (101, _basic),
    "clipworld-long": (102, _long),
    "clipworld-mixed": (103, _mixed),
    "clipworld-stream": (104, _stream),
}
SUITES = tuple(_BUILDERS)


def examples(suite: str, seed: int = 0) -> Iterator[Example]:
    """The endless sequence of a suite's questions; example i depends on (suite, seed, i) alone."""
    if suite not in _BUILDERS:
        raise BadRequest(f"Expected a suite of {', '.join(SUITES)}, but got {suite!r}")
    number, build = _BUILDERS[suite]
    index = 0
    while True:
        rng = np.random.default_rng([seed, number, index])
        yield build(rng, index, f"{suite}-{seed}-{index:05d}")
        index += 1


def seen(example: Example, media: Media) -> Clip:
    """The frames of one of its items that an example's question may use, as they come out of the file."""
    if media.modality == "image":
        return media.frames()
    return through_codec(media.frames())[: _shown(example, media)]


def frames_seen(example: Example) -> int:
    return sum(_shown(example, media) for media in example.media if media.modality == "video")


def _shown(example: Example, media: Media) -> int:
    if example.asked_at_s is None:
        return media.scene.frames
    return round(example.asked_at_s * media.fps)


def write_suite(suite: str, folder: Path, limit: int, seed: int = 0) -> Path:
    """Write the first `limit` questions as `questions.jsonl` (batch format) with their media files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for example in islice(examples(suite, seed), limit):
        content, number = [], 0
        for part in example.parts[:-1]:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            file = _write_media(part, folder / f"{example.example_id}{f'-{number}' if number else ''}")
            content.append({"type": part.modality, part.modality: file.name})
            number += 1
        meta = {"kind": example.question.kind, "suite": suite, "seed": seed}
        if example.depth is not None:
            meta["depth"] = round(example.depth, 4)
        row: dict[str, object] = {
            "id": example.example_id,
            "question": example.question.text,
            "answer": example.question.answer,
            "meta": meta,
        }
        if example.asked_at_s is not None:
            row["end"] = example.asked_at_s
        row |= {"media": content} if number != 1 else {content[0]["type"]: content[0][content[0]["type"]]}
        lines.append(json.dumps(row))
    target = folder / "questions.jsonl"
    target.write_text("\n".join(lines) + "\n")
    return target


def _write_media(media: Media, stem: Path) -> Path:
    if media.modality == "image":
        file = stem.with_suffix(".png")
        Image.fromarray(media.frames()[0]).save(file)
        return file
    file = stem.with_suffix(".mp4")
    write_mp4(media.frames(), file, media.fps)
    return file
