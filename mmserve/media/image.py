"""Image files by Pillow: the header is judged before a pixel is decoded; every mode becomes upright RGB.

Runs inside the decoding sandbox. Knows nothing about processes or models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import PIL
from PIL import ExifTags, Image

from mmserve.errors import MediaError, MMServeError
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_UNREADABLE = "The file is not an image that can be read (JPEG, PNG, WebP or GIF)"
# transpositions that undo each EXIF orientation
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # orientations from here on swap width and height


class UnreadableImage(MediaError):
    """Not an image, or a damaged one; limits are not concerned."""


def plan_image(path: str | Path, limits: MediaLimits) -> MediaPlan:
    """Read the header only. An animation counts as its first frame."""
    width, height = image_size(path, limits)
    return MediaPlan(
        kind="image",
        width=width,
        height=height,
        duration_s=0.0,
        fps=0.0,
        times_s=(0.0,),
        frame_indices=(0,),
        total_frames=1,
        decoder=describe(),
    )


def describe() -> str:
    """What decides about pixels."""
    return f"pillow {PIL.__version__}"


def image_size(source: str | Path | BinaryIO, limits: MediaLimits) -> tuple[int, int]:
    """Upright width and height, by the header only."""
    with opened(source, limits) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= _SIDEWAYS else (width, height)


def decode_image(source: str | Path | BinaryIO, limits: MediaLimits) -> npt.NDArray[np.uint8]:
    """Upright RGB [H, W, 3]; transparency is laid over white."""
    with opened(source, limits) as image:
        return upright_pixels(image)


def upright_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The frame that an opened image stands at."""
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    if orientation in _UNDO:
        rgb = rgb.transpose(_UNDO[orientation])
    return np.array(rgb, dtype=np.uint8)


def resized(pixels: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@contextmanager
def opened(source: str | Path | BinaryIO, limits: MediaLimits) -> Iterator[Image.Image]:
    """The image with its header checked. Whatever the library says, only our own words leave."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=_FORMATS) as image:
                limits.check_size(*image.size)
                yield image
    except MMServeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(
            f"Expected at most {limits.max_pixels} pixels per frame, but got far more"
        ) from error
    except MemoryError as error:
        raise MediaError("The image needs more memory than one item may use") from error
    # damaged files make the library raise almost anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableImage(_UNREADABLE) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation as far as the header tells: asking a PNG for more would decode it."""
    if "exif" not in image.info and image.format != "JPEG":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF is no reason to refuse the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: the library would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64).clip(0, 65_535)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
