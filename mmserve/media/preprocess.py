"""From decoded RGB frames to the pixel tensors of LLaVA-OneVision's vision tower.

Resizes as Pillow does, so results equal transformers' `LlavaOnevisionImageProcessorPil`. Knows nothing
about files or towers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mmserve.errors import ConfigError

_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """Square frames of `side` pixels, normalised as (value * rescale - mean) / std per channel."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bicubic"
    rescale: float = 1 / 255

    @classmethod
    def from_json(cls, settings: Mapping[str, object]) -> PixelFormat:
        number = settings.get("resample", 3)
        if number not in _RESAMPLE:
            raise ConfigError(f"Expected a resample filter of {sorted(_RESAMPLE)}, but got {number}")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(name, True) is not True:
                raise ConfigError(f"Expected {name} true in the preprocessor configuration, but got false")
        return cls(
            side=_side(settings.get("size")),
            mean=_channels(settings, "image_mean"),
            std=_channels(settings, "image_std"),
            resample=_RESAMPLE[int(str(number))],
            rescale=float(str(settings.get("rescale_factor", 1 / 255))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Everything that decides a model's pixels. `pinpoints` are (height, width) to tile images into."""

    image: PixelFormat
    video: PixelFormat
    pinpoints: tuple[tuple[int, int], ...]

    @classmethod
    def from_model_dir(cls, path: str | Path) -> Preprocessing:
        folder = Path(path)
        image = _read_json(folder / "preprocessor_config.json")
        video_file = folder / "video_preprocessor_config.json"
        video = _read_json(video_file) if video_file.exists() else image
        image_format = PixelFormat.from_json(image)
        pinpoints = image.get("image_grid_pinpoints")
        if not isinstance(pinpoints, list) or not pinpoints:
            raise ConfigError("Expected image_grid_pinpoints in preprocessor_config.json, but got none")
        pairs = tuple((int(height), int(width)) for height, width in pinpoints)
        for pair in pairs:
            if any(side % image_format.side or side < 1 for side in pair):
                raise ConfigError(
                    f"Expected grid pinpoints in multiples of {image_format.side}, but got {pair}"
                )
        return cls(image=image_format, video=PixelFormat.from_json(video), pinpoints=pairs)

    @property
    def fingerprint(self) -> str:
        """A hex digest that differs whenever a setting does."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint an image of this size is laid on: most of its pixels kept, then least waste."""
        best, best_kept, best_waste = min(self.pinpoints, key=math.prod), 0, math.inf
        for canvas_height, canvas_width in self.pinpoints:
            scale = min(canvas_width / width, canvas_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            waste = canvas_height * canvas_width - kept
            if kept > best_kept or (kept == best_kept and kept and waste < best_waste):
                best, best_kept, best_waste = (canvas_height, canvas_width), kept, waste
        return best

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many tiles high and wide an image of this size becomes, beside the whole image."""
        canvas_height, canvas_width = self.canvas(height, width)
        return canvas_height // self.image.side, canvas_width // self.image.side


def video_pixels(frames: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """Frames [T, H, W, 3] as float32 [T, 3, S, S]; each is squeezed into the square."""
    pixels = preprocessing.video
    return _normalise(_resize(_channels_first(frames), pixels.side, pixels.side, pixels.resample), pixels)


def image_pixels(
    image: npt.NDArray[np.uint8], preprocessing: Preprocessing, *, tiled: bool = True
) -> torch.Tensor:
    """An image [H, W, 3] as float32 [P, 3, S, S]: the whole image, then its `grid` of tiles in rows.

    With `tiled` false, as among several images of one prompt, it is padded to a square instead and P is 1.
    """
    pixels = preprocessing.image
    source = _channels_first(image[None])
    if not tiled:
        squared = _pad_to_square(source, pixels)
        return _normalise(_resize(squared, pixels.side, pixels.side, pixels.resample), pixels)
    height, width = image.shape[:2]
    canvas = preprocessing.canvas(height, width)
    fitted = _resize(source, *_fit(height, width, canvas), pixels.resample)
    top, left = (canvas[0] - fitted.shape[2]) // 2, (canvas[1] - fitted.shape[3]) // 2
    bottom, right = canvas[0] - fitted.shape[2] - top, canvas[1] - fitted.shape[3] - left
    padded = functional.pad(fitted, (left, right, top, bottom))
    rows, columns = preprocessing.grid(height, width)
    side = pixels.side
    tiles = padded.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    whole = _resize(source, side, side, pixels.resample)
    return _normalise(torch.cat([whole, tiles]), pixels)


def _fit(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    by_height, by_width = canvas[0] / height, canvas[1] / width
    if by_width < by_height:
        return min(math.ceil(height * by_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * by_height), canvas[1])


def _pad_to_square(source: torch.Tensor, pixels: PixelFormat) -> torch.Tensor:
    height, width = source.shape[2:]
    side = max(height, width)
    if height == width:
        return source
    colour = torch.tensor([int(value * 255) for value in pixels.mean], dtype=torch.uint8)
    square = colour.view(1, 3, 1, 1).repeat(1, 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = source
    return square


def _channels_first(frames: npt.NDArray[np.uint8]) -> torch.Tensor:
    # a view: [T, 3, H, W] with the channels innermost, the layout the resize is fastest on
    return torch.from_numpy(frames if frames.flags.writeable else frames.copy()).permute(0, 3, 1, 2)


def _resize(source: torch.Tensor, height: int, width: int, resample: str) -> torch.Tensor:
    """Resize uint8 to uint8: between the two passes values are rounded, as Pillow does."""
    if source.shape[2:] == (height, width):
        return source
    if resample == "nearest-exact":
        return functional.interpolate(source, (height, width), mode=resample)
    return functional.interpolate(source, (height, width), mode=resample, antialias=True, align_corners=False)


def _normalise(source: torch.Tensor, pixels: PixelFormat) -> torch.Tensor:
    # the product in float64 rounds as transformers' does, so that unresized frames are bit-equal
    mean = torch.tensor(pixels.mean, dtype=torch.float32).view(1, 3, 1, 1)
    std = torch.tensor(pixels.std, dtype=torch.float32).view(1, 3, 1, 1)
    scaled = source.contiguous().to(torch.float64).mul_(pixels.rescale).to(torch.float32)
    return scaled.sub_(mean).div_(std)


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected a readable {path.name} in the model's directory") from error
    if not isinstance(content, dict):
        raise ConfigError(f"Expected {path.name} to hold an object, but got {type(content).__name__}")
    return content


def _side(size: object) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, dict):
        found = {size.get(name) for name in ("height", "width", "shortest_edge")} - {None}
        if len(found) == 1 and isinstance(side := found.pop(), int) and side > 0:
            return side
    raise ConfigError(f"Expected a square size in the preprocessor configuration, but got {size}")


def _channels(settings: Mapping[str, object], name: str) -> tuple[float, float, float]:
    values = settings.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise ConfigError(
            f"Expected {name} of three channels in the preprocessor configuration, but got {values}"
        )
    red, green, blue = (float(value) for value in values)
    return red, green, blue
