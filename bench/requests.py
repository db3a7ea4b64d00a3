"""What both sides of a benchmark are asked: made-up videos and questions, the same from the same seed.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

QUESTIONS = 8
FPS = 1.0
CELLS = 12  # patches of one colour per side of a background


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request: a question about a video. Equal seeds are equal videos."""

    video: int
    frames: int
    question: int = 0  # below QUESTIONS
    prefix: int = 0  # above 0: a text before the video, another for each number


def question(number: int) -> str:
    """All questions have equally many tokens, so that a batch of them needs no padding."""
    assert 0 <= number < QUESTIONS
    return f"{number + 1} What happens in the video?"


def video(seed: int, frames: int, side: int) -> NDArray[np.uint8]:
    """Frames [T, S, S, 3]: a patterned background that slides, and a noisy square that jumps over it."""
    rng = np.random.default_rng(seed)
    cells = np.arange(side) * CELLS // side
    background = rng.integers(0, 256, (CELLS, CELLS, 3), np.uint8)[cells][:, cells]
    speed = rng.integers(1, 1 + max(1, side // 16), 2)
    square = max(1, side // 4)
    made = np.empty((frames, side, side, 3), np.uint8)
    for index in range(frames):
        made[index] = np.roll(background, speed * index, (0, 1))
        top, left = rng.integers(0, side - square + 1, 2)
        noise = rng.integers(0, 256, (square, square, 3), np.uint8)
        made[index, top : top + square, left : left + square] = noise
    return made


def messages(ask: Ask, frames: NDArray[np.uint8]) -> list[Mapping[str, Any]]:
    """The conversation as mmserve takes it; what a chat template sees of it is the same for both sides."""
    before = [{"type": "text", "text": f"{ask.prefix} Look."}] if ask.prefix else []
    content = [
        *before,
        {"type": "video", "video": frames, "fps": FPS},
        {"type": "text", "text": question(ask.question)},
    ]
    return [{"role": "user", "content": content}]
