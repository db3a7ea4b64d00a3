"""Training data for `tiny`: rendered clips, per-token labels, and packed questions.

Many questions share one clip in a packed sequence: each sees the clip and itself, never another
question, at the positions it would have alone. Knows nothing about optimisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
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
Purpose = Literal["see", "answer"]
# how often a clip is made for each of KINDS: the tower needs digits to look at, which flash and are
# rare; questions about time are what the language model learns last
TOPIC_SHARES: dict[Purpose, list[float]] = {
    "see": [0.08, 0.08, 0.1, 0.12, 0.5, 0.06, 0.03, 0.03],
    "answer": [0.04, 0.04, 0.16, 0.18, 0.22, 0.18, 0.12, 0.06],
}
TRAIN_STREAM = 7  # keeps training seeds apart from the held-out suites'


class Labels(NamedTuple):
    """What lies under each pooled token, [frames, 36]; the last class of each means "nothing"."""

    colour: Tensor  # int64, len(COLOURS) + 1 classes
    look: Tensor  # int64, len(LOOKS) + 1 classes
    offset: Tensor  # float32 [frames, 36, 2], token centre to object centre in units of 48 px


def make_clip(seed: int, index: int, frames: int, purpose: Purpose) -> tuple[Scene, Clip]:
    """Training clip `index`: half of them as they come back from H.264 at random quality."""
    rng = np.random.default_rng([seed, TRAIN_STREAM, frames, index])
    topic = str(rng.choice(KINDS, p=TOPIC_SHARES[purpose]))
    # what flashes for longer is easier to find: the long flashes teach the short ones
    longest = frames if purpose == "see" else int(rng.choice([2, 2, 4, frames]))
    scene = sample_scene(rng, topic, frames, longest)
    clip = render(scene)
    return scene, through_codec(clip, int(rng.integers(12, 30))) if rng.random() < 0.5 else clip


def _make_clips(seed: int, start: int, stop: int, frames: int, purpose: Purpose) -> list[tuple[Scene, Clip]]:
    return [make_clip(seed, index, frames, purpose) for index in range(start, stop)]


def clip_pool(
    seed: int, start: int, count: int, frames: int, purpose: Purpose, workers: int
) -> list[tuple[Scene, Clip]]:
    """`count` training clips, rendered by a pool of processes."""
    step = 64
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_make_clips, seed, first, min(first + step, start + count), frames, purpose)
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
    return (described + rare + common[:3])[:most]


@dataclass(frozen=True, slots=True)
class Packed:
    """One batch of packed sequences: `visual` embeddings are spliced in after the prefix tokens."""

    tokens: Tensor  # int64 [B, S], media tokens where the visual embeddings go
    positions: Tensor  # int64 [B, S]
    mask: Tensor  # float32 [B, 1, S, S], 0 or -inf-like, additive
    targets: Tensor  # int64 [B, S], -100 where nothing is asked
    weights: Tensor  # float32 [B, S]
    kinds: list[list[tuple[str, int, int]]]  # per row (kind, first target, last target + 1)


class Packer:
    """Turns (visual token count, questions) into `Packed` batches with the model's own chat format."""

    def __init__(self, tokenizer: Tokenizer, video_token: int) -> None:
        self.tokenizer = tokenizer
        self.video_token = video_token
        self.prefix = tokenizer.encode("<|im_start|>user\n").ids
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text).ids
        return self._cache[text]

    def pack(self, visual: int, batch: list[list[Question]]) -> Packed:
        rows = [self._row(visual, asked) for asked in batch]
        length = max(len(row[0]) for row in rows)
        shape = (len(rows), length)
        tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        targets, weights = torch.full(shape, -100), torch.zeros(shape)
        owners = torch.full(shape, -2)
        for index, (ids, places, owner, wanted, _) in enumerate(rows):
            size = len(ids)
            tokens[index, :size] = torch.tensor(ids)
            positions[index, :size] = torch.tensor(places)
            owners[index, :size] = torch.tensor(owner)
            for at, target, weight in wanted:
                targets[index, at] = target
                weights[index, at] = weight
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        shared = (owners[:, None, :] == -1) | (owners[:, :, None] == owners[:, None, :])
        mask = torch.zeros(len(rows), 1, length, length).masked_fill_(~(shared & causal)[:, None], -1e9)
        return Packed(tokens, positions, mask, targets, weights, [row[4] for row in rows])

    def _row(
        self, visual: int, asked: list[Question]
    ) -> tuple[list[int], list[int], list[int], list[tuple[int, int, float]], list[tuple[str, int, int]]]:
        ids = self.prefix + [self.video_token] * visual
        places, owner = list(range(len(ids))), [-1] * len(ids)
        start = len(ids)
        wanted, kinds = [], []
        for number, question in enumerate(asked):
            prompt = self._encode(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._encode(f"{question.answer}<|im_end|>")
            first = len(ids) + len(prompt) - 1
            weight = 1.0 / len(answer) if question.kind == "caption" else 1.0
            wanted += [(first + step, token, weight) for step, token in enumerate(answer)]
            kinds.append((question.kind, first, first + len(answer)))
            ids += prompt + answer
            places += range(start, start + len(prompt) + len(answer))
            owner += [number] * (len(prompt) + len(answer))
        return ids, places, owner, wanted, kinds


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    order = rng.permutation(count)
    for first in range(0, count - size + 1, size):
        yield order[first : first + size]
