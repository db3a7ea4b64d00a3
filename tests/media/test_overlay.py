"""What the sheet of kept, merged and dropped patches shows, pixel by pixel."""

from __future__ import annotations

import numpy as np

from mmserve.media.overlay import CAPTION, MARGIN, MERGED, SIDE, Panel, draw

WHITE = np.full((60, 60, 3), 255, np.uint8)


def middle(sheet: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], row: int, column: int) -> tuple[int, ...]:
    """The colour in the middle of a cell of the first panel, whose grid is 2 x 3."""
    y, x = MARGIN + (2 * row + 1) * SIDE // 4, MARGIN + (2 * column + 1) * SIDE // 6
    return tuple(int(value) for value in sheet[y, x])


def test_dropped_patches_are_dark_and_merged_ones_framed() -> None:
    panel = Panel(WHITE, first=10, grid=(2, 3), stride=4, caption="0.0 s")
    sheet = np.asarray(draw([panel], {10: 1.0, 12: 3.0, 14: 1.0, 13: 1.0}))
    assert middle(sheet, 0, 0) == middle(sheet, 0, 2) == (255, 255, 255)
    assert middle(sheet, 0, 1) == (60, 60, 60)
    assert middle(sheet, 1, 0) == (255, 255, 255)  # 13 stands between the rows, as a newline does
    assert middle(sheet, 1, 1) == (60, 60, 60)
    corner = MARGIN + 2 * SIDE // 3
    assert tuple(sheet[MARGIN, corner]) == MERGED
    assert tuple(sheet[MARGIN, MARGIN]) == (255, 255, 255)


def test_a_sheet_holds_every_panel_in_its_own_shape() -> None:
    wide = np.zeros((30, 60, 3), np.uint8)
    panels = [Panel(WHITE, 0, (2, 2), 2), *[Panel(wide, 4 * n, (2, 2), 2) for n in range(1, 8)]]
    sheet = draw(panels, dict.fromkeys(range(32), 1.0))
    assert sheet.width == MARGIN + 4 * (SIDE + MARGIN)
    assert sheet.height == MARGIN + 2 * (SIDE + CAPTION + MARGIN) + CAPTION + MARGIN
    assert sheet.getpixel((MARGIN + SIDE + MARGIN + 5, MARGIN + 5)) == (0, 0, 0)
