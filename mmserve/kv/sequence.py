"""Pages and slots of one sequence, and how they lie in memory.

Knows nothing about other sequences, free pages or tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.kv.pool import Pages

IntArray = NDArray[np.int32]
SlotArray = NDArray[np.int64]
ALL = slice(None)  # layers
_versions = count()


class Runs(NamedTuple):
    """Contiguous stretches of slots; the slots of a head are those of its runs, one after another.

    `first` belongs to the table: nobody else writes it.
    """

    first: SlotArray  # [runs, layers, kv_heads], flat slot where each run begins
    length: IntArray  # [runs, layers, kv_heads], slots of that run each head has, 0 beyond its end


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the runs of all owned pages begin, whether slots are in use there or not."""

    starts: list[int]  # index of the first slot of each run
    first: SlotArray  # [runs, layers, heads]
    spans: IntArray  # [runs, layers, heads], slots that each run has room for


@dataclass(slots=True)
class SequenceState:
    """Pages and slots of one sequence.

    `order` is [1, 1, capacity] and `position` [1, 1, capacity, axes] while all heads are alike, which
    makes their lengths equal; with `spread` the first two axes become [layers, heads].
    `longest` and `room` repeat what `lengths` and `owned` say, for the sake of appending. `version` is
    another one, never used before by any sequence, whenever pages have changed.
    """

    page_size: int
    pages: Pages  # [layers, heads, capacity], -1 where not owned
    owned: IntArray  # [layers, heads], pages of each head
    lengths: IntArray  # [layers, heads], slots of each head
    order: IntArray
    position: IntArray
    longest: int = 0
    room: int = 0  # slots that every head can take without another page
    version: int = -1
    _layout: _Layout | None = field(default=None)

    @classmethod
    def empty(cls, layers: int, heads: int, page_size: int, axes: int) -> SequenceState:
        return cls(
            page_size,
            np.empty((layers, heads, 0), np.int32),
            np.zeros((layers, heads), np.int32),
            np.zeros((layers, heads), np.int32),
            np.empty((1, 1, 0), np.int32),
            np.empty((1, 1, 0, axes), np.int32),
        )

    @property
    def is_alike(self) -> bool:
        return self.order.shape[:2] == (1, 1)

    @property
    def held(self) -> Pages:
        """All pages, head after head, layer after layer."""
        return self.pages[self.pages >= 0]

    # changing

    def missing(self, slots: int, layers: slice = ALL) -> IntArray:
        """Pages that each head lacks for `slots` more slots in these layers."""
        wanted = self.lengths.copy()
        wanted[layers] += np.int32(slots)
        lacking: IntArray = np.maximum(-(-wanted // self.page_size) - self.owned, 0)
        return lacking

    def grow(self, missing: IntArray, pages: Pages) -> None:
        """Give each head its `missing` pages of `pages`, which are in the order of `held`."""
        target = self.owned + missing
        width = int(target.max())
        if width > self.pages.shape[2]:
            self.pages = _widened(self.pages, width, -1)
        columns = np.arange(self.pages.shape[2])
        self.pages[(columns >= self.owned[..., None]) & (columns < target[..., None])] = pages
        self.owned = target.astype(np.int32)
        self.settle()

    def settle(self) -> None:
        """Bring what is derived up to date after `pages`, `owned` or `lengths` have changed."""
        self._measure()
        self.version = next(_versions)
        self._layout = None

    def _measure(self) -> None:
        self.longest = int(self.lengths.max())
        self.room = int((self.owned * self.page_size - self.lengths).min())

    def trim(self, slots: int, layers: slice) -> Pages:
        """Pages that these layers do not need for `slots` more slots; they are the sequence's no longer."""
        needed = self.owned.copy()
        needed[layers] = -(-(self.lengths[layers] + slots) // self.page_size)
        beyond = (np.arange(self.pages.shape[2]) >= needed[..., None]) & (self.pages >= 0)
        gone = self.pages[beyond]
        self.pages[beyond] = -1
        self.owned = np.minimum(self.owned, needed).astype(np.int32)
        self.settle()
        return gone

    def append(self, order: IntArray, position: IntArray, layers: slice = ALL) -> None:
        """New slots at the end of every head of these layers, within the pages it has."""
        if layers != ALL:
            self.spread()
        count = len(order)
        start = self.longest if layers == ALL else int(self.lengths[layers].max())
        if start + count > self.order.shape[2]:
            self.order = _widened(self.order, start + count, 0)
            self.position = _widened(self.position, start + count, 0)
        if self.is_alike:
            self.order[0, 0, start : start + count] = order
            self.position[0, 0, start : start + count] = position
        else:
            orders, positions = self.order[layers], self.position[layers]
            rows = _rows(orders, self.lengths[layers][..., None] + np.arange(count))
            orders.reshape(-1)[rows] = order
            positions.reshape(-1, positions.shape[3])[rows] = position
        self.lengths[layers] += np.int32(count)
        if layers == ALL:
            self.longest += count
            self.room -= count
        else:
            self._measure()

    def compact(self, start: int, kept: SlotArray) -> None:
        """Of the slots from `start` on only these are left, in every head; the pages stay."""
        assert self.is_alike, "heads have lost different slots"
        stop = start + len(kept)
        for values in (self.order, self.position):
            values[:, :, start:stop] = values[:, :, kept]
        self.lengths[:] = stop
        self._measure()

    def replace(self, layer: int, head: int, pages: Pages, slots: SlotArray) -> None:
        """One head now has these pages, and of its slots these; the other heads keep what they have."""
        self.spread()
        for values in (self.order, self.position):
            values[layer, head, : len(slots)] = values[layer, head, slots]
        self.pages[layer, head] = -1
        self.pages[layer, head, : len(pages)] = pages
        self.owned[layer, head] = len(pages)
        self.lengths[layer, head] = len(slots)
        self.settle()

    def spread(self) -> None:
        """From now on every head has orders and positions of its own."""
        if self.is_alike:
            heads = self.pages.shape[:2]
            self.order = np.broadcast_to(self.order, (*heads, *self.order.shape[2:])).copy()
            self.position = np.broadcast_to(self.position, (*heads, *self.position.shape[2:])).copy()

    def unite(self) -> None:
        """Undo `spread` where all heads turn out alike."""
        fields = (self.lengths, self.order, self.position)
        if all((values == values[:1, :1]).all() for values in fields):
            self.order, self.position = self.order[:1, :1].copy(), self.position[:1, :1].copy()

    # reading

    def tail(self, count: int, layers: slice = ALL) -> SlotArray:
        """Flat slots of the last `count` slots of every head of these layers, [layers, heads, count]."""
        if not self.is_alike:
            return self.flat(self.lengths[layers][..., None] - count + np.arange(count), layers)
        assert layers == ALL, "all heads are alike, so no layer has other slots"
        first, skipped = divmod(self.longest - count, self.page_size)
        if count == 1:
            # one type throughout: with two, numpy allocates buffers that take longer than the rest
            slots = self.pages[:, :, first].astype(np.int64)
            slots *= self.page_size
            slots += skipped
            return slots[..., None]
        pages = self.pages[:, :, first : -(-self.longest // self.page_size)].astype(np.int64) * self.page_size
        slots = (pages[..., None] + np.arange(self.page_size)).reshape(*pages.shape[:2], -1)
        return slots[:, :, skipped : skipped + count]

    def flat(self, index: SlotArray, layers: slice = ALL) -> SlotArray:
        """Flat slots of slot indices [layers, heads, n]."""
        pages = self.pages[layers]
        if pages.shape[2] == 0:
            return np.zeros(index.shape, np.int64)
        page, offset = np.divmod(index, self.page_size)
        return pages.reshape(-1)[_rows(pages, page)] * np.int64(self.page_size) + offset

    def runs(self) -> Runs:
        if self._layout is None:
            self._layout = self._lay_out()
        starts, first, spans = self._layout.starts, self._layout.first, self._layout.spans
        count = bisect_left(starts, self.longest)
        if count == 1:
            return Runs(first[:1], self.lengths[None].copy())
        if self.is_alike:
            length = spans[:count].copy()
            length[count - 1 :] = self.longest - starts[count - 1] if count else 0
            return Runs(first[:count], length)
        rest = self.lengths - np.array(starts[:count], np.int32)[:, None, None]
        np.minimum(rest, spans[:count], out=rest)
        np.maximum(rest, 0, out=rest)
        return Runs(first[:count], rest)

    def _lay_out(self) -> _Layout:
        width = int(self.owned.max())
        pages, columns = self.pages[..., :width], np.arange(1, width)
        breaks = (np.diff(pages, axis=2) != 1) & (columns < self.owned[..., None])
        begins = np.concatenate([[0] if width else [], np.flatnonzero(breaks.any(axis=(0, 1))) + 1])
        begins = begins.astype(np.int32)
        ends = np.append(begins[1:], np.int32(width))
        owned = np.clip(self.owned, begins[:, None, None], ends[:, None, None])
        first = np.maximum(np.moveaxis(pages[..., begins], 2, 0), 0) * np.int64(self.page_size)
        return _Layout(
            (begins * self.page_size).tolist(),
            np.ascontiguousarray(first),
            (owned - begins[:, None, None]) * np.int32(self.page_size),
        )


def _rows(array: IntArray, index: SlotArray) -> SlotArray:
    """Where column `index` [layers, heads, n] of `array` lies once its first three axes are one."""
    layers, heads, width = array.shape[:3]
    rows: SlotArray = (np.arange(layers * heads) * width).reshape(layers, heads, 1) + index
    return rows


def _widened(array: IntArray, width: int, fill: int) -> IntArray:
    """A copy whose third axis is at least doubled to hold `width`, so that growth stays cheap."""
    shape = (*array.shape[:2], max(width, 2 * array.shape[2]), *array.shape[3:])
    wider = np.full(shape, fill, np.int32)
    wider[:, :, : array.shape[2]] = array
    return wider
