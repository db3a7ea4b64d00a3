"""The picture of what is left of a conversation's images, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmserve.ask import messages
from mmserve.errors import BadRequest
from mmserve.media.overlay import CAPTION, MARGIN, MERGED, SIDE
from mmserve.request import MediaOptions, MediaReport, TokenReport
from mmserve.show import check_target, show_tokens


def reported(kept: list[int], weight: list[float]) -> MediaReport:
    tokens = TokenReport(
        frame_tokens=5,
        grids=((0, 2, 2, 2),),
        kept=np.array(kept, "<i4").tobytes(),
        weight=np.array(weight, "<f4").tobytes(),
    )
    return MediaReport(
        source="a.png", frames=1, timestamps_s=(0.0,), lost_frames=0, width=40, height=40, tokens=tokens
    )


def test_every_item_is_drawn_with_its_own_tokens(tmp_path: Path) -> None:
    files = []
    for name, shade in (("a.png", 200), ("b.png", 100)):
        Image.new("RGB", (40, 40), (shade, shade, shade)).save(tmp_path / name)
        files.append(str(tmp_path / name))
    out = tmp_path / "out.png"
    media = [reported([0, 3, 4], [1, 2, 1]), reported([1], [1])]
    show_tokens(messages(files, "What?"), MediaOptions(), media, out)
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    quarter, left, right = SIDE // 4, MARGIN, 2 * MARGIN + SIDE
    shades = [
        [
            int(pixels[MARGIN + row * quarter, start + column * quarter, 0])
            for row in (1, 3)
            for column in (1, 3)
        ]
        for start in (left, right)
    ]
    assert shades[0][0] == shades[0][3] == 200
    assert shades[1][1] == 100
    assert max(shades[0][1], shades[0][2], shades[1][0], shades[1][2], shades[1][3]) < 60
    assert tuple(pixels[MARGIN + 2 * quarter, left + 2 * quarter + 5]) == MERGED
    assert pixels.shape[0] > SIDE + CAPTION


def test_items_of_which_nothing_is_said_cannot_be_shown(tmp_path: Path) -> None:
    plain = MediaReport(source="a", frames=1, timestamps_s=(0.0,), lost_frames=0, width=1, height=1)
    for media in ([], [plain]):
        with pytest.raises(BadRequest):
            show_tokens([], MediaOptions(), media, tmp_path / "out.png")


@pytest.mark.parametrize("name", ["out.mp4", "absent/out.png", "out"])
def test_a_place_that_takes_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest):
        check_target(tmp_path / name)
