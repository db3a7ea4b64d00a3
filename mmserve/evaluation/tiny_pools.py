"""Training items made ahead of the trainer by another process, as a function of seed and step alone.

Knows scenes and the tower, nothing about rows or optimisation.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from mmserve.evaluation.clipworld import Scene
from mmserve.evaluation.curriculum import Lesson, make_scene
from mmserve.evaluation.tiny_data import pixels

Items = list[tuple[Scene, NDArray[np.int16]]]
FRAMES_AT_ONCE = 128  # through the tower


class Item(NamedTuple):
    """A scene and its embeddings as `embed_clip` makes them, their bits as int16."""

    scene: Scene
    content: Tensor


def embed_frames(model: LlavaOnevisionForConditionalGeneration, frames: Tensor, *, pooled: bool) -> Tensor:
    """Pixels [F, 3, H, W] to projected tokens: [F, 36, D] of video frames, or [F, 144, D] of crops."""
    inner = model.model
    features = inner.vision_tower(frames, output_hidden_states=True).hidden_states[-1]
    projected: Tensor = inner.multi_modal_projector(features)
    return inner.apply_pooling(projected) if pooled else projected


@torch.no_grad()
def embed_clip(
    model: LlavaOnevisionForConditionalGeneration, clip: NDArray[np.uint8], *, image: bool
) -> Tensor:
    """bf16 [T, 36, D] of a video, [144, D] of an image."""
    device = model.device.type
    parts = []
    for first in range(0, len(clip), FRAMES_AT_ONCE):
        with torch.autocast(device, torch.bfloat16):
            frames = pixels(clip[first : first + FRAMES_AT_ONCE]).to(model.device)
            parts.append(embed_frames(model, frames, pooled=not image).bfloat16())
    tokens = torch.cat(parts)
    return tokens[0] if image else tokens


_tower: dict[str, LlavaOnevisionForConditionalGeneration] = {}  # of a worker process


def _start_worker(config: LlavaOnevisionConfig, weights: dict[str, NDArray[np.float32]]) -> None:
    os.nice(10)  # training must not wait for its own data
    torch.set_num_threads(1)
    # built here: the hooks that collect hidden states do not survive the way into this process
    model = LlavaOnevisionForConditionalGeneration(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    _tower["model"] = model


def _weights(model: LlavaOnevisionForConditionalGeneration) -> dict[str, NDArray[np.float32]]:
    return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def _make(seed: int, lesson: Lesson, start: int, stop: int) -> Items:
    made: Items = []
    for index in range(start, stop):
        scene, clip = make_scene(seed, lesson, index)
        tokens = embed_clip(_tower["model"], clip, image=lesson == "image")
        made.append((scene, tokens.view(torch.int16).numpy()))
    return made


@dataclass(frozen=True, slots=True)
class Supply:
    """A chunk of `size` new items every `every` steps; the last `window` chunks are in use."""

    size: int
    every: int
    window: int


class Pools:
    """The items of several lessons that step k may use, one chunk made ahead of time."""

    def __init__(
        self,
        seed: int,
        supplies: dict[Lesson, Supply],
        model: LlavaOnevisionForConditionalGeneration,
        workers: int,
    ) -> None:
        self._seed = seed
        self._supplies = supplies
        context = multiprocessing.get_context("spawn")
        self._workers = ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_start_worker,
            initargs=(model.config, _weights(model)),
        )
        self._chunks: dict[Lesson, deque[list[Item]]] = {
            lesson: deque(maxlen=supply.window) for lesson, supply in supplies.items()
        }
        self._next: dict[Lesson, tuple[int, Future[Items]]] = {}

    def advance(self, step: int) -> None:
        """Have what step `step` uses; at first this makes all that an uninterrupted run would have."""
        for lesson, supply in self._supplies.items():
            newest = step // supply.every
            if lesson not in self._next:
                oldest = max(0, newest - supply.window + 1)
                self._next[lesson] = (oldest, self._order(lesson, oldest))
        for lesson, supply in self._supplies.items():
            newest = step // supply.every
            while self._next[lesson][0] <= newest:
                number, made = self._next[lesson]
                self._next[lesson] = (number + 1, self._order(lesson, number + 1))
                items = [Item(scene, torch.from_numpy(content)) for scene, content in made.result()]
                self._chunks[lesson].append(items)

    def draw(self, lesson: Lesson, rng: np.random.Generator) -> Item:
        chunks = self._chunks[lesson]
        chunk = chunks[int(rng.integers(len(chunks)))]
        return chunk[int(rng.integers(len(chunk)))]

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)

    def _order(self, lesson: Lesson, number: int) -> Future[Items]:
        size = self._supplies[lesson].size
        return self._workers.submit(_make, self._seed, lesson, number * size, (number + 1) * size)
