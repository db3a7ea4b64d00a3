"""The picture of what is left of a conversation's images, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from mmserve.ask import messages
from mmserve.errors import BadRequest
from mmserve.media import heatmap
from mmserve.media.overlay import CAPTION, MARGIN, MERGED, SIDE
from mmserve.request import AttentionReport, MediaOptions, MediaReport, Methods, TokenReport
from mmserve.show import check_target, show_attention, show_tokens
from tests.fake_llm import completion


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


def test_a_heads_map_is_drawn_beside_what_is_seen_of_it(tmp_path: Path) -> None:
    out, side = tmp_path / "out.png", 4
    attention, seen = np.full((side, side), 255, np.uint8), np.zeros((side, side), np.uint8)
    attention[3, 0], seen[3, 0] = 0, 255
    done = msgspec.structs.replace(
        completion("yes"),
        attention=AttentionReport(
            recall=(1.0, 0.5),
            layer=1,
            head=2,
            chosen="grid",
            head_density=0.25,
            head_recall=0.5,
            cell=8,
            side=side,
            attention=attention.tobytes(),
            seen=seen.tobytes(),
        ),
    )
    show_attention(done, out)
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet).astype(int)
    left, right, top = heatmap.MARGIN, 2 * heatmap.MARGIN + heatmap.SIDE, heatmap.MARGIN + heatmap.LINE
    cell = heatmap.SIDE // side
    shades = [
        [pixels[top + row * cell + 5, start + column * cell + 5] for row, column in ((3, 0), (2, 1), (0, 3))]
        for start in (left, right)
    ]
    assert [tuple(shade) for shade in shades[0]] == [(8, 8, 32), (255, 235, 140), heatmap.BACK]
    assert [tuple(shade) for shade in shades[1]] == [tuple(heatmap.SEEN), heatmap.HIDDEN, heatmap.BACK]


def test_an_answer_without_a_map_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="nothing is reported of it with prune carriers"):
        show_attention(completion("yes", Methods(prune="carriers")), tmp_path / "out.png")
