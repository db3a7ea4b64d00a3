"""Vertical and slash lines of one head inside one group of keys: single keys, and diagonals as runs.

Keys are numbered inside their group: all slots, those of vision, or those of text. Knows nothing about how
a group lies on the axis of an index.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.attention.patterns.boundary import Longs, Windows

BAND = 64


class Picked(NamedTuple):
    """What one head's last rows looked at most."""

    keys: Longs  # ascending
    offsets: Longs  # how far keys of a diagonal stand before their rows, descending


class Spans(NamedTuple):
    """Stretches [start, stop) of keys, ascending inside a tile, and single keys; `tile` is whose they are."""

    tile: Longs
    start: Longs
    stop: Longs
    key_tile: Longs
    key: Longs


def spans(picked: Picked, first: Longs, last: Longs, window: Windows, *, diagonal: bool) -> Spans:
    """The lines of tiles whose rows stand between `first` and `last` of the group, inside their windows.

    A diagonal covers what any row between them would see by it. Nothing in a window is listed, and no key
    twice. Without `diagonal` the rows are not of the group: only single keys.
    """
    offsets = picked.offsets if diagonal else picked.offsets[:0]
    found = [
        _same_height(picked.keys, offsets, first, window, np.flatnonzero(last - first == height), int(height))
        for height in np.unique(last - first)
    ]
    return Spans(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _same_height(
    keys: Longs, offsets: Longs, first: Longs, window: Windows, tiles: Longs, height: int
) -> Spans:
    """Tiles whose rows stand `height` apart: their stretches are the same, but for where they begin."""
    # diagonals that overlap or touch are one stretch
    breaks = np.diff(offsets) < -(height + 1)
    begins = -offsets[np.concatenate([[True], breaks])] if len(offsets) else offsets
    ends = height + 1 - offsets[np.concatenate([breaks, [True]])] if len(offsets) else offsets
    lowest, highest = window.sink_stop[tiles, None], window.local_start[tiles, None]
    start = np.maximum(first[tiles, None] + begins, lowest)
    stop = np.minimum(first[tiles, None] + ends, highest)
    some = start < stop
    tile = np.broadcast_to(tiles[:, None], some.shape)[some]
    is_single = (keys >= lowest) & (keys < highest)
    if len(begins):
        behind = keys - first[tiles, None]
        at = np.searchsorted(begins, behind, "right") - 1
        is_single &= (at < 0) | (behind >= ends[at])
    which, key = np.nonzero(is_single)
    return Spans(tile, start[some], stop[some], tiles[which], keys[key])


def pick(
    vertical: NDArray[np.float32],
    slash: NDArray[np.float32],
    *,
    keys: int,
    offsets: int,
    sink: int,
    local: int,
    rows: int,
) -> Picked:
    """The `keys` heaviest columns and about `offsets` heaviest diagonals of one head that no window covers.

    `rows` is how many rows were probed, the last ones. Diagonals are taken `BAND` side by side: a block of
    rows computes that many of them at once.
    """
    total = len(vertical)
    inner = np.arange(min(sink, total), max(total - local - rows, 0))
    bands = max(total - local, 0) // BAND
    weight = slash[local : local + bands * BAND].reshape(bands, BAND).sum(1)
    chosen = _heaviest(weight, np.arange(bands), -(-offsets // BAND))
    beyond = (local + chosen[:, None] * BAND + np.arange(BAND)).flatten()
    return Picked(_heaviest(vertical, inner, keys), beyond[::-1].copy())


def _heaviest(weight: NDArray[np.float32], among: Longs, count: int) -> Longs:
    """Up to `count` of the places `among` with most weight, ascending."""
    if count == 0 or count >= len(among):
        return among[:count]
    best = np.argpartition(weight[among], len(among) - count)[len(among) - count :]
    return np.sort(among[best])
