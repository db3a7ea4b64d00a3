"""Pixels equal transformers' Pillow processors, in values and in the number of tiles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmserve.errors import ConfigError
from mmserve.media.preprocess import PixelFormat, Preprocessing, image_pixels, video_pixels

SIDE = 64
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 4) for columns in range(1, 4)]
SETTINGS = {
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.75],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
FORMAT = PixelFormat(side=SIDE, mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.75))
# one step of a pixel before normalisation by the smallest deviation
STEP = 1 / 255 / 0.25


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(SETTINGS | {"image_grid_pinpoints": PINPOINTS})
    )
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


@pytest.fixture
def preprocessing(model_dir: Path) -> Preprocessing:
    return Preprocessing.from_model_dir(model_dir)


def noise(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Smooth colours with noise on top: both the resize's weights and its rounding matter."""
    generator = np.random.default_rng(7)
    ramp = np.linspace(0, 200, shape[-2])[:, None]
    return np.asarray(ramp + generator.integers(0, 56, shape), dtype=np.uint8)


SHAPES = [(64, 64), (128, 128), (37, 91), (300, 200), (1, 1), (5, 400), (64, 63), (480, 854)]


@pytest.mark.parametrize("shape", SHAPES)
def test_video_frames_equal_siglip_in_transformers(
    preprocessing: Preprocessing, shape: tuple[int, int]
) -> None:
    frames = noise(2, *shape, 3)
    oracle = SiglipImageProcessorPil(**SETTINGS)
    expected = oracle([Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    pixels = video_pixels(frames, preprocessing)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (2, 3, SIDE, SIDE)
    if shape == (SIDE, SIDE):
        assert torch.equal(pixels, expected)
    assert (pixels - expected).abs().max() <= 1.01 * STEP


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_equal_llava_onevision_in_transformers(
    preprocessing: Preprocessing, shape: tuple[int, int], tiled: bool
) -> None:
    image = noise(*shape, 3)
    oracle = LlavaOnevisionImageProcessorPil(**SETTINGS, image_grid_pinpoints=PINPOINTS)
    picture = Image.fromarray(image)
    asked = [picture] if tiled else [[picture, picture]]
    expected = oracle(asked, return_tensors="pt")["pixel_values"][0]
    pixels = image_pixels(image, preprocessing, tiled=tiled)
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().max() <= 1.01 * STEP
    if tiled:
        assert len(pixels) == 1 + math.prod(preprocessing.grid(*shape))


@settings(max_examples=200)
@given(height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_the_canvas_is_the_one_transformers_selects(height: int, width: int) -> None:
    image = Preprocessing(image=FORMAT, video=FORMAT, pinpoints=tuple((h, w) for h, w in PINPOINTS))
    expected = select_best_resolution((height, width), PINPOINTS)
    # transformers finds none for a strip too thin to keep a pixel
    assert image.canvas(height, width) == (expected or (SIDE, SIDE))


def test_read_only_frames_are_accepted(preprocessing: Preprocessing) -> None:
    frames = noise(1, 20, 20, 3)
    frames.flags.writeable = False
    assert video_pixels(frames, preprocessing).shape == (1, 3, SIDE, SIDE)


def test_the_fingerprint_changes_with_any_setting(model_dir: Path) -> None:
    before = Preprocessing.from_model_dir(model_dir)
    (model_dir / "video_preprocessor_config.json").write_text(
        json.dumps(SETTINGS | {"image_mean": [0.5, 0.4, 0.31]})
    )
    after = Preprocessing.from_model_dir(model_dir)
    assert (
        before.fingerprint
        == Preprocessing(image=before.image, video=before.video, pinpoints=before.pinpoints).fingerprint
    )
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 64, "width": 32}},
        {"size": {"height": 0, "width": 0}},
        {"image_mean": None},
        {"resample": 99},
        {"do_normalize": False},
        {"image_grid_pinpoints": []},
        {"image_grid_pinpoints": [[65, 64]]},
    ],
)
def test_unusable_configurations_are_refused(model_dir: Path, change: dict[str, object]) -> None:
    content = SETTINGS | {"image_grid_pinpoints": PINPOINTS} | change
    (model_dir / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError):
        Preprocessing.from_model_dir(model_dir)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        Preprocessing.from_model_dir(tmp_path)
