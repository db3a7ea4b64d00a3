"""Rows of a prompt that do not see all that came before: frames whose tokens nobody sees after them.

A slot is seen by the rows from its own order up to, but without, the order it is seen `until`. Between
those ends attention is causal: a chunk falls into segments, and each sees some older slots and its own.
Knows nothing about frames, pages or tensors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mmserve.kv.table import IntArray, SlotArray


class Run(NamedTuple):
    """Slots `start + i * stride` for i below `length`, as indices into what a sequence has."""

    start: int
    stride: int
    length: int


class Segment(NamedTuple):
    """New slots [start, stop), which see `seen`, ascending slots before them, and each other causally."""

    start: int
    stop: int
    seen: SlotArray


def segments(order: IntArray, until: IntArray, rows: int) -> list[Segment]:
    """The last `rows` slots of a sequence cut wherever slots before cease to be seen; both are [slots]."""
    slots = len(order)
    first = slots - rows
    ends = np.unique(np.searchsorted(order, until))
    cuts = [first, *ends[(ends > first) & (ends < slots)].tolist(), slots]
    return [
        Segment(start, stop, np.flatnonzero(until[:start] > order[start])) for start, stop in pairwise(cuts)
    ]


def runs_of(slots: SlotArray) -> list[Run]:
    """Ascending slots as few runs of equal distances."""
    runs: list[Run] = []
    gaps, at = np.diff(slots), 0
    while at < len(slots):
        rest = gaps[at:]
        stride = int(rest[0]) if len(rest) else 1
        others = np.flatnonzero(rest != stride)
        length = (int(others[0]) if len(others) else len(rest)) + 1
        runs.append(Run(int(slots[at]), stride, length))
        at += length
    return runs
