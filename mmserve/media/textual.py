"""Whether a picture is dense with text: a page, a screenshot, a chart with labels.

Such a picture is read, not looked at: each of its tokens says something of its own, so none can stand for
others. Knows nothing about tokens or methods.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 768  # a larger picture is looked at about this size: what is smaller then, few models can read
CELL = 16
CONTRAST = 60  # of 255, between writing and what it is written on
FLAT = 0.35  # share of a cell that what it is written on has at least: noise and foliage have none
STROKES = 20  # pixels of a cell where a stroke begins, and as many where one ends, from left to right
RUNGS = 8  # the same from top to bottom: stripes have none
CELLS = 20  # that hold writing, at least: a few letters are looked at
DENSE = 0.04  # share of the cells that hold writing
LABELLED = 0.012  # the same of a drawing, such as a chart, most of whose other cells are plain
PLAIN = 0.3  # share of cells of one shade that only drawings have


def is_textual(picture: NDArray[np.uint8]) -> bool:
    """Of an RGB picture [H, W, 3], whether it is to be read; takes a few milliseconds."""
    cells = _cells(picture)
    if not len(cells):
        return False
    low, high = cells.min((1, 2)), cells.max((1, 2))
    contrast = high - low
    is_drawn = (contrast <= 2).mean() >= PLAIN
    bold = contrast >= CONTRAST
    writing = int(_hold_writing(cells[bold], low[bold], high[bold]).sum())
    return writing >= max(CELLS, len(cells) * (LABELLED if is_drawn else DENSE))


def _hold_writing(
    cells: NDArray[np.int16], low: NDArray[np.int16], high: NDArray[np.int16]
) -> NDArray[np.bool_]:
    """Which cells, of these shades, hold strokes with both edges on a plain ground."""
    near = ((high - low) // 4)[:, None, None]
    is_low, is_high = cells <= low[:, None, None] + near, cells >= high[:, None, None] - near
    ground = np.maximum(is_low.mean((1, 2)), is_high.mean((1, 2)))
    step = near + near // 2
    across, down = cells[:, :, 2:] - cells[:, :, :-2], cells[:, 2:] - cells[:, :-2]
    found: NDArray[np.bool_] = ground >= FLAT
    return found & (_both(across, step) >= STROKES) & (_both(down, step) >= RUNGS)


def _both(change: NDArray[np.int16], step: NDArray[np.int16]) -> NDArray[np.int64]:
    """Of every cell, how many changes go up, or down, whichever are fewer."""
    rises, falls = (change > step).sum((1, 2)), (change < -step).sum((1, 2))
    fewer: NDArray[np.int64] = np.minimum(rises, falls)
    return fewer


def _cells(picture: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Cells [n, CELL, CELL] of green, which is most of what is seen; what does not fill one is left out."""
    # every n-th pixel, because averages would blur strokes
    step = max(1, max(picture.shape[:2]) // SIDE)
    green = picture[::step, ::step, 1].astype(np.int16)
    rows, columns = (length // CELL for length in green.shape)
    whole = green[: rows * CELL, : columns * CELL]
    return whole.reshape(rows, CELL, columns, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL)
