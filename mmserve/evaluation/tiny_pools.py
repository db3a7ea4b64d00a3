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

from mmserve.encoders.siglip import attention_received
from mmserve.evaluation.clipworld import Scene
from mmserve.evaluation.curriculum import Lesson, make_scene
from mmserve.evaluation.tiny_data import pixels

Items = list[tuple[Scene, NDArray[np.int16], NDArray[np.float32]]]
FRAMES_AT_ONCE = 128  # through the tower


class Item(NamedTuple):
    """A scene with what `embed_clip` makes of it; the bits of its tokens as int16."""

    scene: Scene
    content: Tensor
    saliency: Tensor


class Embedded(NamedTuple):
    """Tokens of the T frames of a video, or of an image, and the attention each received in the tower."""

    tokens: Tensor  # bf16 [T, 36, D] or [144, D]
    saliency: Tensor  # float32 [T, 36] or [144]


def embed_frames(model: LlavaOnevisionForConditionalGeneration, frames: Tensor, *, pooled: bool) -> Tensor:
    """Pixels [F, 3, H, W] to projected tokens: [F, 36, D] of video frames, or [F, 144, D] of crops."""
    return _look(model, frames, pooled=pooled)[0]


def _look(
    model: LlavaOnevisionForConditionalGeneration, frames: Tensor, *, pooled: bool
) -> tuple[Tensor, Tensor]:
    """Projected tokens, and the last layer's input."""
    inner = model.model
    states = inner.vision_tower(frames, output_hidden_states=True).hidden_states
    projected: Tensor = inner.multi_modal_projector(states[-1])
    return inner.apply_pooling(projected) if pooled else projected, states[-2]


@torch.no_grad()
def embed_clip(
    model: LlavaOnevisionForConditionalGeneration, clip: NDArray[np.uint8], *, image: bool
) -> Embedded:
    device, inner = model.device.type, model.model
    tokens, saliency = list[Tensor](), list[Tensor]()
    for first in range(0, len(clip), FRAMES_AT_ONCE):
        with torch.autocast(device, torch.bfloat16):
            frames = pixels(clip[first : first + FRAMES_AT_ONCE]).to(model.device)
            seen, state = _look(model, frames, pooled=not image)
            received = attention_received(inner.vision_tower.encoder.layers[-1], state)[..., None]
        tokens.append(seen.bfloat16())
        saliency.append((received if image else inner.apply_pooling(received))[..., 0])
    whole = Embedded(torch.cat(tokens), torch.cat(saliency))
    return Embedded(whole.tokens[0], whole.saliency[0]) if image else whole


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
        tokens, saliency = embed_clip(_tower["model"], clip, image=lesson == "image")
        made.append((scene, tokens.view(torch.int16).numpy(), saliency.numpy()))
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
                items = [
                    Item(scene, torch.from_numpy(content), torch.from_numpy(saliency))
                    for scene, content, saliency in made.result()
                ]
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
