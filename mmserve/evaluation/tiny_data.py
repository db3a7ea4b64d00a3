"""Training data for the tower of `tiny`: rendered clips and what lies under each of their tokens.

Also which questions about a scene are worth asking in training. Knows nothing about optimisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.evaluation.clipworld import (
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
from mmserve.evaluation.tiny_model import POOLED

LOOKS = (*SHAPES, *"0123456789")
# how often a clip is made for each of KINDS: digits flash and would be rare
TOPIC_SHARES = [0.08, 0.08, 0.1, 0.12, 0.5, 0.06, 0.03, 0.03]
TRAIN_STREAM = 7  # keeps training seeds apart from the held-out suites'


class Labels(NamedTuple):
    """What lies under each pooled token, [frames, 36]; the last class of each means "nothing"."""

    colour: Tensor  # int64, len(COLOURS) + 1 classes
    look: Tensor  # int64, len(LOOKS) + 1 classes
    offset: Tensor  # float32 [frames, 36, 2], token centre to object centre in units of 48 px


def make_clip(seed: int, index: int, frames: int) -> tuple[Scene, Clip]:
    """Clip `index` of the tower: half of them as they come back from H.264 at random quality."""
    rng = np.random.default_rng([seed, TRAIN_STREAM, frames, index])
    scene = sample_scene(rng, str(rng.choice(KINDS, p=TOPIC_SHARES)), frames, frames)
    clip = render(scene)
    return scene, through_codec(clip, int(rng.integers(12, 30))) if rng.random() < 0.5 else clip


def _make_clips(seed: int, start: int, stop: int, frames: int) -> list[tuple[Scene, Clip]]:
    return [make_clip(seed, index, frames) for index in range(start, stop)]


def clip_pool(seed: int, start: int, count: int, frames: int, workers: int) -> list[tuple[Scene, Clip]]:
    """`count` training clips, rendered by a pool of processes."""
    step = 64
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_make_clips, seed, first, min(first + step, start + count), frames)
            for first in range(start, start + count, step)
        ]
        return [item for job in jobs for item in job.result()]


def token_labels(scenes: list[Scene]) -> Labels:
    cell = SIDE / POOLED
    centres = (np.arange(POOLED) + 0.5) * cell
    colours, looks, offsets = [], [], []
    for scene in scenes:
        for frame in range(scene.frames):
            colour = np.full((POOLED, POOLED), len(COLOURS))
            look = np.full((POOLED, POOLED), len(LOOKS))
            offset = np.zeros((POOLED, POOLED, 2), np.float32)
            for actor, x, y in visible(scene, frame):
                dx, dy = x - centres[None, :], y - centres[:, None]
                inside = (np.abs(dx) < actor.size / 2) & (np.abs(dy) < actor.size / 2)
                colour[inside] = list(COLOURS).index(actor.colour)
                look[inside] = LOOKS.index(actor.look)
                offset[inside] = np.stack(np.broadcast_arrays(dx, dy), -1)[inside] / 48
            colours.append(colour.reshape(-1))
            looks.append(look.reshape(-1))
            offsets.append(offset.reshape(-1, 2))
    return Labels(*(torch.from_numpy(np.stack(rows)) for rows in (colours, looks, offsets)))


def pixels(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [F, H, W, 3] to the tower's float32 [F, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def captions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Lists of a frame's objects in reading order, attributes in both orders: they teach binding."""
    frame = int(rng.integers(scene.frames))
    seen = [(y // 48, x, actor) for actor, x, y in visible(scene, frame)]
    listed = [actor for _, _, actor in sorted(seen, key=lambda item: item[:2])]
    if not listed:
        return []
    when = "the last frame" if frame == scene.frames - 1 else f"frame {frame + 1}"
    first = " ".join(f"{actor.colour} {actor.look}" for actor in listed)
    second = " ".join(f"{actor.look} {actor.colour}" for actor in listed)
    return [
        Question("caption", f"List the objects in {when}, colour and shape.", first),
        Question("caption", f"List the objects in {when}, shape and colour.", second),
    ]


def training_questions(rng: np.random.Generator, scene: Scene, most: int) -> list[Question]:
    """Up to `most` questions about a scene; near-constant answers are thinned out."""
    asked = [
        question
        for question in questions(rng, scene)
        if not (question.kind == "cuts" and question.answer == "0" and rng.random() < 0.7)
    ]
    rare = [q for q in asked if q.kind in ("direction", "digit", "order", "cuts", "count")]
    common = [q for q in asked if q not in rare]
    listed = captions(rng, scene)
    rng.shuffle(common)
    described = [listed[int(rng.integers(2))]] if listed and rng.random() < 0.3 else []
    return (described + rare + common[:5])[:most]


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    order = rng.permutation(count)
    for first in range(0, count - size + 1, size):
        yield order[first : first + size]
