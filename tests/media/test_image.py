"""Images: header limits before decoding, every mode and orientation to upright RGB (R11, R14, R16)."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmserve.config import Limits
from mmserve.errors import MediaError
from mmserve.media.image import decode_image, plan_image
from mmserve.media.limits import MediaLimits
from tests.media.clips import png_bomb

LIMITS = MediaLimits()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\x00" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [(1, 1), (2, 3), (27, 28), (1, 200), (1023, 7)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, side: tuple[int, int], mode: str) -> None:
    """R16, of one file."""
    path = tmp_path / "image"
    picture = Image.new("L", side, 200)
    converted = Image.new("I;16", side, 51_400) if mode == "I;16" else picture.convert(mode)
    converted.save(path, "JPEG" if mode == "CMYK" else "PNG")
    plan = plan_image(path, LIMITS)
    pixels = decode_image(path, LIMITS)
    assert (plan.kind, plan.width, plan.height, plan.times_s) == ("image", *side, (0.0,))
    assert pixels.shape == (side[1], side[0], 3)
    assert pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels.astype(int) - 200).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(tmp_path: Path, kind: str, orientation: int) -> None:
    """R16, of one file."""
    path = tmp_path / "image"
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, kind, exif=exif, quality=100)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    plan = plan_image(path, LIMITS)
    decoded = decode_image(path, LIMITS)
    assert decoded.shape == (plan.height, plan.width, 3)
    np.testing.assert_array_equal(decoded, expected)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)).save(path)
    left, middle, right = decode_image(path, LIMITS)[0].tolist()
    assert left == [255, 255, 255]
    assert middle == [255, 0, 0]
    assert all(abs(value - 127) <= 1 for value in right)


def test_an_animation_counts_as_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "image.gif"
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    first.save(path, save_all=True, append_images=[second], duration=100)
    assert decode_image(path, LIMITS)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (65_535, 4, "at most 16384 pixels"),
        (16_000, 16_000, "at most 33500000 pixels per frame"),
        (100_000, 100_000, "pixels"),
        (402, 2, "aspect ratio of at most 200"),
    ],
)
def test_bombs_are_refused_from_their_header(tmp_path: Path, width: int, height: int, message: str) -> None:
    """R11: within 50 ms and 20 MB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(MediaError, match=message):
        plan_image(path, LIMITS)
    assert time.process_time() - began < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    """R11: only JPEG, PNG, WebP and GIF are let in."""
    path = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(MediaError, match="not an image that can be read"):
        plan_image(path, LIMITS)


def test_a_real_bomb_of_31_kilobytes_is_refused(tmp_path: Path) -> None:
    """R11: 16,000 squared at one bit a pixel would be 1.25 GB; nothing of it is decoded."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(16_000))
    assert path.stat().st_size < 40_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    for look in (plan_image, decode_image):
        with pytest.raises(MediaError, match="at most 33500000 pixels per frame"):
            look(path, LIMITS)
    assert time.process_time() - began < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((4, 4), (3, 4)),
        ((16_384, 82), (16_385, 82)),
        ((5787, 5788), (5788, 5789)),
        ((800, 4), (801, 4)),
    ],
)
def test_a_deployments_limits_hold_at_their_borders(
    tmp_path: Path, inside: tuple[int, int], outside: tuple[int, int]
) -> None:
    """R11: sides of 4 to 16,384, at most 33.5 megapixels and 200:1."""
    limits = MediaLimits.from_config(Limits())
    path = tmp_path / "image.png"
    path.write_bytes(png_header(*inside))
    assert plan_image(path, limits).width == inside[0]
    path.write_bytes(png_header(*outside))
    with pytest.raises(MediaError):
        plan_image(path, limits)


def test_a_file_of_two_kinds_is_what_its_beginning_says(tmp_path: Path) -> None:
    """R11: what a picture carries behind or inside it is never looked at."""
    path = tmp_path / "image"
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(buffer, "PNG")
    picture = buffer.getvalue()
    for tail in (
        b"<script>alert(1)</script>",
        b"PK\x03\x04" + bytes(64),
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"%PDF-1.7",
    ):
        path.write_bytes(picture + tail)
        assert decode_image(path, LIMITS).shape == (16, 16, 3)
        path.write_bytes(tail + picture)
        with pytest.raises(MediaError, match="not an image that can be read"):
            plan_image(path, LIMITS)


def _samples() -> list[bytes]:
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        Image.new("RGB", (24, 16), (9, 99, 199)).save(buffer, kind)
        found.append(buffer.getvalue())
    return [*found, b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.sampled_from(_samples()),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5),
    cut=st.integers(0, 400),
)
def test_damaged_images_give_pixels_or_our_own_words(
    tmp_path: Path, content: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path / "image"
    damaged = bytearray(content)
    for place, value in changes:
        if place < len(damaged):
            damaged[place] = value
    path.write_bytes(damaged[: len(damaged) - cut] if cut < 200 else damaged)
    message = ""
    try:
        plan = plan_image(path, LIMITS)
        pixels = decode_image(path, LIMITS)
        assert pixels.shape == (plan.height, plan.width, 3)
    except MediaError as error:
        message = error.public_message
    for leak in ("0x", "BytesIO", str(tmp_path), "Traceback", "PIL"):
        assert leak not in message
