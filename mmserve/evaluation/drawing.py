"""Pixels for ClipWorld: sprites from signed distances, textured and photo-like backgrounds.

Knows nothing about questions, suites or time; every function is a pure function of its arguments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frame = NDArray[np.uint8]  # [H, W, 3]
Plane = NDArray[np.floating[Any]]  # [H, W]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (30, 160, 50),
    "blue": (35, 70, 225),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 190),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
OUTLINE = (70, 70, 70)
PLATE = (20, 20, 40)  # behind digits
# segments a..g of a seven-segment display lit for each digit
_SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
_SEGMENT_BOXES = {  # centre x, centre y, half width, half height in units of the half size
    "a": (0.0, -0.72, 0.40, 0.14),
    "b": (0.44, -0.36, 0.14, 0.40),
    "c": (0.44, 0.36, 0.14, 0.40),
    "d": (0.0, 0.72, 0.40, 0.14),
    "e": (-0.44, 0.36, 0.14, 0.40),
    "f": (-0.44, -0.36, 0.14, 0.40),
    "g": (0.0, 0.0, 0.40, 0.14),
}


def _polygon(x: Plane, y: Plane, points: list[tuple[float, float]]) -> Plane:
    """Signed distance to a polygon (negative inside), after Quilez' winding-number form."""
    corners = np.asarray(points, np.float32)
    distance = np.full_like(x, np.inf)
    sign = np.ones_like(x)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above, below, left = y >= ay, y < by, ex * wy > ey * wx
        sign = np.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return (sign * np.sqrt(distance)).astype(np.float32)


def _union(parts: list[Plane]) -> Plane:
    joined: Plane = np.minimum.reduce(parts).astype(np.float32)
    return joined


def _distance(shape: str, x: Plane, y: Plane) -> Plane:
    """Signed distance in units of the half size; the shape fills [-1, 1] squared."""
    radius: Plane = np.hypot(x, y)
    if shape == "circle":
        return radius - 0.95
    if shape == "ring":
        ring: Plane = np.abs(radius - 0.70) - 0.25
        return ring
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88
    if shape == "diamond":
        diamond: Plane = (np.abs(x) + np.abs(y) - 1.0) * 0.7071
        return diamond
    if shape == "cross":
        bar = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
        post = np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.95)
        return _union([bar, post])
    if shape == "triangle":
        return _polygon(x, y, [(0, -0.95), (0.95, 0.85), (-0.95, 0.85)])
    if shape == "star":
        turns = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return _polygon(x, y, list(zip(radii * np.sin(turns), -radii * np.cos(turns), strict=True)))
    if shape == "heart":
        lobes = [np.hypot(x - side, y + 0.40) - 0.50 for side in (0.46, -0.46)]
        tip = _polygon(x, y, [(-0.92, -0.18), (0.0, 0.98), (0.92, -0.18), (0.0, -0.45)])
        return _union([*lobes, tip])
    raise ValueError(f"Expected one of {SHAPES}, but got {shape!r}")


def _digit_distance(digit: int, x: Plane, y: Plane) -> Plane:
    boxes = [_SEGMENT_BOXES[name] for name in _SEGMENTS[digit]]
    parts = [np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h) for cx, cy, w, h in boxes]
    return _union(parts)


@lru_cache(maxsize=4096)
def _stamp(look: str, colour: str, size: int, eighth_x: int, eighth_y: int) -> tuple[Plane, Plane]:
    """Colour and coverage of one sprite on its own small canvas, offset by eighths of a pixel."""
    span = np.arange(size + 2, dtype=np.float32) - size / 2 - 0.5
    half = size / 2
    x = np.broadcast_to((span - eighth_x / 8)[None, :] / half, (size + 2, size + 2))
    y = np.broadcast_to((span - eighth_y / 8)[:, None] / half, (size + 2, size + 2))
    if look in SHAPES:
        outer = _distance(look, x, y) * half
        # a grey rim separates the object from backgrounds of its own colour
        inside = np.clip(-outer - 1.0, 0, 1)[..., None]
        paint = inside * np.array(COLOURS[colour], np.float32) + (1 - inside) * np.array(OUTLINE, np.float32)
    else:
        outer = (np.maximum(np.abs(x), np.abs(y)) - 0.98) * half
        lit = np.clip(0.5 - _digit_distance(int(look), x, y) * half, 0, 1)[..., None]
        paint = lit * np.float32(255.0) + (1 - lit) * np.array(PLATE, np.float32)
    return paint.astype(np.float32), np.clip(0.5 - outer, 0, 1).astype(np.float32)[..., None]


def draw_sprite(canvas: NDArray[np.float32], look: str, colour: str, size: int, x: float, y: float) -> None:
    """Paint a shape (or a digit "0" to "9" on a dark plate) in place, top-left corner at (x, y) pixels."""
    eighths_x, eighths_y = round(x * 8), round(y * 8)
    left, top = eighths_x // 8 - 1, eighths_y // 8 - 1
    paint, cover = _stamp(look, colour, size, eighths_x % 8, eighths_y % 8)
    height, width = canvas.shape[:2]
    y0, y1, x0, x1 = max(top, 0), min(top + size + 2, height), max(left, 0), min(left + size + 2, width)
    if y0 >= y1 or x0 >= x1:
        return
    crop = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    target = canvas[y0:y1, x0:x1]
    target += cover[crop] * (paint[crop] - target)


def _value_noise(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Smooth noise in [0, 1] that wraps around at the borders, shape [size, size]."""
    grid = np.pad(rng.random((cells, cells), dtype=np.float32), 2, mode="wrap")
    scale = size // cells
    image = Image.fromarray(grid).resize(
        (grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.BICUBIC
    )
    return np.asarray(image, np.float32)[2 * scale : 2 * scale + size, 2 * scale : 2 * scale + size]


def _muted(rng: np.random.Generator) -> NDArray[np.float32]:
    """A dull colour, so that saturated sprites stand out."""
    return np.float32(rng.uniform(70, 190)) + rng.uniform(-28, 28, 3).astype(np.float32)


def background(rng: np.random.Generator, size: int = 192) -> NDArray[np.float32]:
    """A picture [size, size, 3] that tiles seamlessly: gradient, stripes, checks, or photo-like noise."""
    first, second = _muted(rng), _muted(rng)
    kind = rng.choice(["wave", "stripes", "checks", "photo", "photo"])
    ramp = np.arange(size, dtype=np.float32) / size
    if kind == "wave":
        mix = 0.5 + 0.25 * (np.sin(2 * np.pi * ramp)[:, None] + np.cos(2 * np.pi * ramp)[None, :])
    elif kind == "stripes":
        repeats = int(rng.choice([4, 6, 8, 12]))
        wave = (0.5 + 0.5 * np.sin(2 * np.pi * repeats * ramp))[:, None] * np.ones(size, np.float32)
        mix = wave if rng.random() < 0.5 else wave.T
    elif kind == "checks":
        steps = (np.arange(size) // int(rng.choice([16, 24, 32]))) % 2
        mix = (steps[:, None] ^ steps[None, :]).astype(np.float32)
    else:
        octaves = [(4, 0.5), (8, 0.25), (16, 0.15), (48, 0.1)]
        layers = [sum(w * _value_noise(rng, size, c) for c, w in octaves) for _ in range(2)]
        tint = (np.asarray(layers[1], np.float32) - 0.5)[..., None] * rng.uniform(-70, 70, 3).astype(
            np.float32
        )
        mix = np.clip((np.asarray(layers[0], np.float32) - 0.3) * 2.5, 0, 1)
        return np.clip(first + mix[..., None] * (second - first) + tint, 0, 255).astype(np.float32)
    picture: NDArray[np.float32] = first + np.asarray(mix, np.float32)[..., None] * (second - first)
    return picture
