"""A picture of what a reduction method left of its media: kept, merged and dropped patches.

Knows nothing about methods or about where pictures come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 240  # longest side of a panel, pixels
MARGIN = 10
CAPTION = 20
MERGED = (255, 159, 28)
TEXT, BACK = (32, 32, 32), (255, 255, 255)


class Panel(NamedTuple):
    """A picture and the tokens that stand for it: a grid, its rows `stride` tokens apart from `first` on."""

    picture: NDArray[np.uint8]  # [H, W, 3]
    first: int
    grid: tuple[int, int]  # rows, columns
    stride: int
    caption: str = ""


def draw(panels: Sequence[Panel], weights: Mapping[int, float]) -> Image.Image:
    """All panels on one sheet. `weights` says of each survivor how many tokens were merged into it.

    Dropped patches are dark, kept ones as they are, and those that others were merged into are framed.
    """
    columns = min(len(panels), max(1, round(math.sqrt(len(panels) * 1.6))))
    rows = -(-len(panels) // columns)
    drawn = [_panel(panel, weights) for panel in panels]
    height = max(picture.height for picture in drawn) + CAPTION + MARGIN
    size = MARGIN + columns * (SIDE + MARGIN), MARGIN + rows * height + CAPTION + MARGIN
    sheet = Image.new("RGB", size, BACK)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (panel, picture) in enumerate(zip(panels, drawn, strict=True)):
        left = MARGIN + index % columns * (SIDE + MARGIN)
        top = MARGIN + index // columns * height
        sheet.paste(picture, (left, top))
        pen.text((left, top + picture.height + 3), panel.caption, TEXT, font)
    pen.text((MARGIN, sheet.height - CAPTION - MARGIN // 2), _legend(panels, weights), TEXT, font)
    return sheet


def _cells(panel: Panel) -> NDArray[np.int64]:
    """The token of every cell, [rows, columns]."""
    rows, columns = panel.grid
    cells: NDArray[np.int64] = panel.first + np.arange(rows)[:, None] * panel.stride + np.arange(columns)
    return cells


def _panel(panel: Panel, weights: Mapping[int, float]) -> Image.Image:
    picture = Image.fromarray(panel.picture)
    picture = picture.resize(_fitted(picture.size), Image.Resampling.LANCZOS)
    rows, columns = panel.grid
    cells = _cells(panel)
    alive = np.vectorize(weights.__contains__, otypes=[bool])(cells)
    shade = Image.fromarray(np.where(alive, 255, 60).astype(np.uint8)).resize(
        picture.size, Image.Resampling.NEAREST
    )
    picture = Image.composite(picture, Image.new("RGB", picture.size), shade)
    pen = ImageDraw.Draw(picture)
    for row, column in np.argwhere(alive):
        if weights[int(cells[row, column])] > 1:
            left, right = (round(edge * picture.width / columns) for edge in (column, column + 1))
            top, bottom = (round(edge * picture.height / rows) for edge in (row, row + 1))
            pen.rectangle((left, top, right - 1, bottom - 1), outline=MERGED, width=2)
    return picture


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _legend(panels: Sequence[Panel], weights: Mapping[int, float]) -> str:
    tokens = [int(token) for panel in panels for token in _cells(panel).flat]
    merged = sum(weights.get(token, 0) > 1 for token in tokens)
    kept = sum(token in weights for token in tokens) - merged
    dropped = len(tokens) - kept - merged
    return f"{kept} kept, {merged} with others merged in (framed), {dropped} gone (dark), of {len(tokens)}"
