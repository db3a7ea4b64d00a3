"""A picture of one head's attention map beside what a sparse pattern sees of it.

Knows nothing about models or patterns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 512  # of a map, pixels
MARGIN = 16
LINE = 18
TEXT, BACK, HIDDEN = (32, 32, 32), (255, 255, 255), (222, 222, 222)
SEEN = np.array([38, 110, 190])
# dark to light through blue and orange, by share of a byte
COLOURS = np.array([(8, 8, 32), (52, 24, 110), (150, 40, 110), (235, 110, 50), (255, 235, 140)])


class Map(NamedTuple):
    """Cells of rows by keys, bytes: the largest weight in each by decades, and how much of it is seen."""

    attention: NDArray[np.uint8]  # [side, side]
    seen: NDArray[np.uint8]


def draw_map(found: Map, captions: tuple[str, str], lines: tuple[str, ...]) -> Image.Image:
    """Both, a caption above each and lines below; rows go down, keys to the right."""
    causal = np.tri(len(found.attention), dtype=bool)
    stops = np.linspace(0, 255, len(COLOURS))
    heat = np.stack([np.interp(found.attention, stops, channel) for channel in COLOURS.T], -1)
    share = found.seen[..., None] / 255
    pattern = share * SEEN + (1 - share) * np.array(HIDDEN)
    height = MARGIN + LINE + SIDE + MARGIN + LINE * len(lines)
    sheet = Image.new("RGB", (3 * MARGIN + 2 * SIDE, height + MARGIN // 2), BACK)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (cells, caption) in enumerate(zip((heat, pattern), captions, strict=True)):
        left = MARGIN + place * (SIDE + MARGIN)
        shown = np.where(causal[..., None], cells, BACK).round().astype(np.uint8)
        pen.text((left, MARGIN // 2), caption, TEXT, font)
        sheet.paste(Image.fromarray(shown).resize((SIDE, SIDE), _sampling(len(shown))), (left, MARGIN + LINE))
    for number, line in enumerate(lines):
        pen.text((MARGIN, 2 * MARGIN + LINE + SIDE + number * LINE), line, TEXT, font)
    return sheet


def _sampling(side: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if side <= SIDE else Image.Resampling.BOX
