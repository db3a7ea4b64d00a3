"""Prompt layout: expansion, survivors, and token counts against transformers' own processor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from mmserve.errors import BadRequest, ConfigError, WireError
from mmserve.models.layout import Walk, expand
from mmserve.models.layout.llava_onevision import DEFAULT_PINPOINTS, Geometry

IMAGE, VIDEO = 90, 91
REAL = Geometry(image_side=384, patch_side=14, pinpoints=DEFAULT_PINPOINTS, max_crops=9)
SMALL = Geometry(image_side=28, patch_side=4, pinpoints=((28, 56), (56, 28), (84, 56), (56, 84)), max_crops=2)


def test_placeholders_expand_in_order() -> None:
    ids = expand([1, VIDEO, 2, IMAGE, 3], [3, 2], (IMAGE, VIDEO))
    assert ids.tolist() == [1, VIDEO, VIDEO, VIDEO, 2, IMAGE, IMAGE, 3]


@pytest.mark.parametrize("counts", [[], [3, 3]])
def test_placeholders_must_equal_items(counts: list[int]) -> None:
    with pytest.raises(
        BadRequest, match=f"Expected {len(counts)} media placeholders in the prompt, but got 1"
    ):
        expand([1, VIDEO, 2], counts, (IMAGE, VIDEO))
    with pytest.raises(BadRequest, match="media placeholders"):
        Walk([1, VIDEO, 2], len(counts), (IMAGE, VIDEO))


def test_a_walk_numbers_the_uncompressed_prompt_part_by_part() -> None:
    walk = Walk([1, VIDEO, 2, IMAGE, 3], 2, (IMAGE, VIDEO))
    rows = [walk.text(), walk.part(3, np.array([0, 2], np.int32)), walk.part(1, np.array([0], np.int32))]
    assert (walk.item, walk.length, walk.is_over) == (0, 5, False)
    walk.leave_item()
    rows += [walk.text(), walk.part(2, np.array([], np.int32))]
    walk.leave_item()
    rows.append(walk.text())
    assert [row.order.tolist() for row in rows] == [[0], [1, 3], [4], [5], [], [8]]
    assert [row.token_ids.tolist() for row in rows] == [[1], [VIDEO] * 2, [VIDEO], [2], [], [3]]
    assert [row.is_visual for row in rows] == [False, True, True, False, True, False]
    assert (walk.length, walk.is_over) == (9, True)


@pytest.mark.parametrize("kept", [[3, 0], [0, 0], [0, 4], [-1, 2]])
def test_kept_tokens_that_cannot_be_are_refused(kept: list[int]) -> None:
    with pytest.raises(WireError, match="ascending kept tokens below 4"):
        Walk([VIDEO], 1, (VIDEO,)).part(4, np.array(kept, np.int32))


def peer(geometry: Geometry) -> SimpleNamespace:
    """What transformers' processor methods read of themselves."""
    return SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(p) for p in geometry.pinpoints]),
        num_image_tokens=geometry.grid**2,
        vision_aspect_ratio=f"anyres_max_{geometry.max_crops}",
        _get_unpadded_features=lambda *args: LlavaOnevisionProcessor._get_unpadded_features(
            SimpleNamespace(vision_aspect_ratio=f"anyres_max_{geometry.max_crops}"), *args
        ),
    )


@pytest.mark.parametrize("geometry", [REAL, SMALL], ids=["real", "small"])
@given(height=st.integers(4, 3000), width=st.integers(4, 3000))
def test_image_counts_equal_transformers(geometry: Geometry, height: int, width: int) -> None:
    pinpoints = [list(p) for p in geometry.pinpoints]
    assert geometry.resolution(height, width) == select_best_resolution((height, width), pinpoints)
    crops = image_size_to_num_patches((height, width), pinpoints, geometry.image_side)
    assert geometry.image_crops(height, width) == crops
    side = geometry.image_side
    tokens = LlavaOnevisionProcessor._get_number_of_features(peer(geometry), height, width, side, side)
    assert geometry.image_tokens(height, width) == tokens


def test_video_counts_pool_the_grid_and_end_with_a_newline() -> None:
    assert REAL.frame_tokens == 196
    assert REAL.video_tokens(32) == 32 * 196 + 1
    assert SMALL.frame_tokens == 16


def test_one_of_several_images_is_its_base_crop_only() -> None:
    assert REAL.image_crops(900, 700, images=2) == 1
    assert REAL.image_tokens(900, 700, images=2) == 730
    assert REAL.image_grids(900, 700, images=2) == ((27, 27),)


def test_tiles_are_one_grid_without_what_pads_them() -> None:
    # 3 x 2 tiles of 27 x 27 patches; the picture is wider than they are
    assert REAL.resolution(1000, 720) == (1152, 768)
    whole, (rows, columns) = REAL.image_grids(1000, 720)
    assert whole == (27, 27)
    assert (rows, columns) == (75, 54)
    assert REAL.image_tokens(1000, 720) == 27 * 27 + rows * (columns + 1)


def test_geometry_takes_transformers_defaults() -> None:
    assert Geometry.from_config({"model_type": "llava_onevision"}) == REAL
    config = {"vision_config": {"image_size": 28, "patch_size": 4}, "image_grid_pinpoints": [[28, 28]]}
    assert Geometry.from_config(config).pinpoints == ((28, 28),)
    with pytest.raises(ConfigError, match="anyres_max_9, but got pad"):
        Geometry.from_config({"vision_aspect_ratio": "pad"})
