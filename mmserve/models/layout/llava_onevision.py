"""Prompt layout of LLaVA-OneVision: token counts of videos and images; RoPE positions are orders.

The arithmetic follows transformers' processor, so that expanded prompts are equal. Pure Python and
numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from mmserve.errors import ConfigError

SIDES = range(384, 2305, 384)
DEFAULT_PINPOINTS = tuple(product(SIDES, SIDES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How pixels become tokens. `pinpoints` are the (height, width) an image may be resized to."""

    image_side: int
    patch_side: int
    pinpoints: tuple[tuple[int, int], ...]
    max_crops: int  # images above this many crops are shrunk

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """From a checkpoint's config.json; absent values are transformers' defaults."""
        vision = config.get("vision_config") or {}
        ratio = str(config.get("vision_aspect_ratio", "anyres_max_9"))
        pinpoints = config.get("image_grid_pinpoints") or DEFAULT_PINPOINTS
        limit = ratio.removeprefix("anyres_max_")
        if not limit.isdecimal():
            raise ConfigError(f"Expected vision_aspect_ratio of the form anyres_max_9, but got {ratio}")
        return cls(
            image_side=int(vision.get("image_size", 384)),
            patch_side=int(vision.get("patch_size", 14)),
            pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
            max_crops=int(limit),
        )

    @property
    def grid(self) -> int:
        """Patches per side of a crop."""
        return self.image_side // self.patch_side

    @property
    def frame_tokens(self) -> int:
        """Tokens of one pooled video frame."""
        rows, columns = self.frame_grid
        return rows * columns

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Rows and columns of one pooled video frame."""
        return math.ceil(self.grid / 2), math.ceil(self.grid / 2)

    def video_tokens(self, frames: int) -> int:
        """Tokens of a video, the newline at its end included."""
        return frames * self.frame_tokens + 1

    def resolution(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of `pinpoints` that shows most of an image and wastes least."""

        def quality(target: tuple[int, int]) -> tuple[int, int]:
            scale = min(target[1] / width, target[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - target[0] * target[1]

        return max(self.pinpoints, key=quality)

    def image_crops(self, height: int, width: int, images: int = 1) -> int:
        """Crops of an image that is one of `images` in its prompt: the whole image, then the tiles.

        With several images only the whole image is used.
        """
        if images > 1:
            return 1
        target_height, target_width = self.resolution(height, width)
        return 1 + math.ceil(target_height / self.image_side) * math.ceil(target_width / self.image_side)

    def image_tokens(self, height: int, width: int, images: int = 1) -> int:
        """Tokens of an image that is one of `images` in its prompt, newlines included."""
        grids = self.image_grids(height, width, images)
        newlines = grids[1][0] if len(grids) > 1 else 1
        return sum(rows * columns for rows, columns in grids) + newlines

    def image_grids(self, height: int, width: int, images: int = 1) -> tuple[tuple[int, int], ...]:
        """Rows and columns, newlines not counted, of the whole image, and of its tiles put together."""
        whole = self.grid, self.grid
        if images > 1:
            return (whole,)
        target_height, target_width = self.resolution(height, width)
        rows = self.grid * (target_height // self.image_side)
        columns = self.grid * (target_width // self.image_side)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        shrink = math.sqrt(rows * columns / (self.max_crops * self.grid**2))
        if shrink > 1.1:
            rows, columns = int(rows // shrink), int(columns // shrink)
        return whole, (rows, columns)
