"""Which pages hold the KV of which sequence: one list of pages per layer and KV head.

Everything is vectorised over layers and heads. Knows nothing about tensors: `PageStore` holds the
contents, and the flat slots returned here (page * page_size + offset) address it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.errors import MMServeError
from mmserve.kv.pool import PagePool, Pages

IntArray = NDArray[np.int32]
SlotArray = NDArray[np.int64]
NO_ORDER = np.iinfo(np.int32).max  # pads `orders`: later than every query


class OutOfPages(MMServeError):
    """The pool has not enough free pages; nothing was changed."""

    status = 503
    code = "out_of_pages"
    retryable = True


class Moves(NamedTuple):
    """Slots to copy at once, before anything else is written: content of `source` goes to `destination`."""

    source: SlotArray
    destination: SlotArray


@dataclass(slots=True)
class _Sequence:
    """Pages and slots of one sequence.

    `order` and `position` are [1, 1, capacity] while all heads are alike, [layers, heads, capacity]
    after the first `keep`.
    """

    pages: Pages  # [layers, heads, capacity], -1 where not owned
    owned: IntArray  # [layers, heads], pages of each head
    lengths: IntArray  # [layers, heads], slots of each head
    order: IntArray
    position: IntArray


class PageTable:
    """Page lists, slot orders and RoPE positions of every sequence.

    Invariants: a page has one place in at most one head of a sequence; a page with several owners is
    full and is never written; a head owns the pages of its slots and those it reserved.
    """

    def __init__(self, layers: int, kv_heads: int, num_pages: int, page_size: int = 32) -> None:
        self.layers = layers
        self.kv_heads = kv_heads
        self.num_pages = num_pages
        self.page_size = page_size
        self._pool = PagePool(num_pages)
        self._sequences: dict[str, _Sequence] = {}

    @property
    def free_pages(self) -> int:
        return self._pool.free

    @property
    def used_pages(self) -> int:
        return self.num_pages - self._pool.free

    def pages_for(self, slots: int) -> int:
        """Pages that a new sequence of `slots` slots in every head takes."""
        return self.layers * self.kv_heads * -(-slots // self.page_size)

    def __contains__(self, sequence: str) -> bool:
        return sequence in self._sequences

    # growing

    def can_append(self, sequence: str | None, slots: int) -> bool:
        """Whether `slots` more slots per head fit; None stands for a new sequence."""
        if sequence is None or sequence not in self._sequences:
            return self.pages_for(slots) <= self.free_pages
        return int(self._missing(self._sequences[sequence], slots).sum()) <= self.free_pages

    def reserve(self, sequence: str, slots: int) -> None:
        """Own pages for `slots` more slots per head, contiguous where possible; creates the sequence."""
        state = self._sequences.get(sequence) or self._new()
        missing = self._missing(state, slots)
        self._demand(int(missing.sum()))
        self._sequences[sequence] = state
        self._grow(state, missing)

    def append(self, sequence: str, order: IntArray, position: IntArray) -> SlotArray:
        """New slots at the end of every head: flat slots [layers, kv_heads, n]. Creates the sequence."""
        assert order.ndim == 1, "order is one value per slot"
        assert order.shape == position.shape, "order and position are of equal length"
        self.reserve(sequence, len(order))
        state = self._sequences[sequence]
        self._grow_metadata(state, int(state.lengths.max()) + len(order))
        index = state.lengths[..., None] + np.arange(len(order))  # [layers, heads, n]
        some = index[: state.order.shape[0], : state.order.shape[1]]
        np.put_along_axis(state.order, some, order.astype(np.int32)[None, None], axis=2)
        np.put_along_axis(state.position, some, position.astype(np.int32)[None, None], axis=2)
        state.lengths += len(order)
        return self._flat(state, index)

    def restore(self, sequence: str, lengths: IntArray, order: IntArray, position: IntArray) -> SlotArray:
        """A new sequence with these `lengths` [layers, kv_heads]; returns its flat slots [sum of lengths].

        Slots, `order` and `position` are head after head, layer after layer.
        """
        assert sequence not in self._sequences, f"sequence {sequence} exists"
        state = self._new()
        missing = -(-lengths.astype(np.int32) // self.page_size)
        self._demand(int(missing.sum()))
        self._sequences[sequence] = state
        self._grow(state, missing)
        state.lengths[:] = lengths
        index = np.broadcast_to(np.arange(lengths.max()), (*lengths.shape, int(lengths.max())))
        mask = index < lengths[..., None]
        state.order = np.zeros(mask.shape, np.int32)
        state.position = np.zeros(mask.shape, np.int32)
        state.order[mask] = order
        state.position[mask] = position
        alike = (lengths == lengths[0, 0]).all() and all(
            (field == field[:1, :1]).all() for field in (state.order, state.position)
        )
        if alike:
            state.order = state.order[:1, :1].copy()
            state.position = state.position[:1, :1].copy()
        return self._flat(state, np.where(mask, index, 0))[mask]

    # reading

    def lengths(self, sequence: str) -> IntArray:
        """Slots per head, int32 [layers, kv_heads]."""
        return self._sequences[sequence].lengths.copy()

    def slots(self, sequence: str, layer: int) -> SlotArray:
        """Flat slots of one layer, int64 [kv_heads, longest], padded with -1."""
        state = self._sequences[sequence]
        lengths = state.lengths[layer]
        longest = int(lengths.max())
        first = state.pages[layer, :, : -(-longest // self.page_size)].astype(np.int64) * self.page_size
        flat = (first[..., None] + np.arange(self.page_size)).reshape(self.kv_heads, -1)[:, :longest]
        if (lengths != longest).any():
            flat[np.arange(longest) >= lengths[:, None]] = -1
        return flat

    def tail(self, sequence: str, count: int) -> SlotArray:
        """Flat slots of the last `count` slots of every head, int64 [layers, kv_heads, count]."""
        state = self._sequences[sequence]
        assert int(state.lengths.min()) >= count, "a head has fewer slots"
        return self._flat(state, state.lengths[..., None] - count + np.arange(count))

    def orders(self, sequence: str, layer: int) -> IntArray:
        """Orders of one layer's slots, int32 [kv_heads, longest] padded with `NO_ORDER`; [1, n] if alike."""
        state = self._sequences[sequence]
        lengths = state.lengths[layer]
        longest = int(lengths.max())
        if state.order.shape[0] == 1:
            return state.order[0, :, :longest]
        return np.where(np.arange(longest) < lengths[:, None], state.order[layer, :, :longest], NO_ORDER)

    def order(self, sequence: str, layer: int, head: int) -> IntArray:
        """Index of each slot in the uncompressed prompt, int32 [length]."""
        state = self._sequences[sequence]
        return self._row(state.order, layer, head)[: state.lengths[layer, head]].copy()

    def position(self, sequence: str, layer: int, head: int) -> IntArray:
        """RoPE position with which each slot's key was rotated, int32 [length]."""
        state = self._sequences[sequence]
        return self._row(state.position, layer, head)[: state.lengths[layer, head]].copy()

    # shrinking and sharing

    def keep(self, sequence: str, layer: int, head: int, slots: SlotArray) -> Moves:
        """Keep only these slots of a head (ascending indices into its current slots).

        Survivors move to fresh private pages; with too few free pages, to the front of the head's own
        pages if nobody shares them. What the head had reserved is given back.
        """
        state = self._sequences[sequence]
        length, owned = int(state.lengths[layer, head]), int(state.owned[layer, head])
        assert len(slots) == 0 or (slots[0] >= 0 and slots[-1] < length), "a kept slot does not exist"
        assert (np.diff(slots) > 0).all(), "kept slots ascend"
        if len(slots) == length:
            return Moves(np.empty(0, np.int64), np.empty(0, np.int64))
        old = state.pages[layer, head, :owned].copy()
        need = -(-len(slots) // self.page_size)
        if need <= self.free_pages:
            pages, gone = self._pool.take(need), old
        elif self._pool.is_private(old):
            pages, gone = old[:need], old[need:]
        else:
            raise OutOfPages(f"Expected {need} free KV pages to keep, but got {self.free_pages}")
        self._pool.release(gone)
        if state.order.shape[0] == 1:
            shape = (self.layers, self.kv_heads, state.order.shape[2])
            state.order = np.broadcast_to(state.order, shape).copy()
            state.position = np.broadcast_to(state.position, shape).copy()
        for field in (state.order, state.position):
            field[layer, head, : len(slots)] = field[layer, head, slots]
        state.pages[layer, head] = -1
        state.pages[layer, head, :need] = pages
        state.owned[layer, head] = need
        state.lengths[layer, head] = len(slots)
        return Moves(self._address(old, slots), self._address(pages, np.arange(len(slots))))

    def fork(self, parent: str, child: str) -> Moves:
        """A new sequence with the parent's slots: full pages are shared, partly filled ones copied."""
        assert child not in self._sequences, f"sequence {child} exists"
        old = self._sequences[parent]
        full, rest = np.divmod(old.lengths, self.page_size)
        partial = (rest > 0).astype(np.int32)
        self._demand(int(partial.sum()))
        state = self._new()
        shared = np.arange(old.pages.shape[2]) < full[..., None]
        state.pages = np.where(shared, old.pages, -1).astype(np.int32)
        state.owned = full.astype(np.int32)
        self._pool.share(state.pages[state.pages >= 0])
        self._grow(state, partial)
        state.lengths = old.lengths.copy()
        state.order, state.position = old.order.copy(), old.position.copy()
        self._sequences[child] = state
        offsets = np.arange(self.page_size)
        index = np.minimum(full[..., None] * self.page_size + offsets, old.lengths[..., None] - 1)
        mask = offsets < rest[..., None]
        index = np.maximum(index, 0)
        return Moves(self._flat(old, index)[mask], self._flat(state, index)[mask])

    def release(self, sequence: str) -> None:
        """Give up every page of a sequence and forget it."""
        state = self._sequences.pop(sequence)
        self._pool.release(state.pages[state.pages >= 0])

    def check(self) -> None:
        """Assert the invariants; for tests and idle moments."""
        self._pool.check([state.pages[state.pages >= 0] for state in self._sequences.values()])
        for state in self._sequences.values():
            columns = np.arange(state.pages.shape[2])
            assert np.array_equal(state.pages >= 0, columns < state.owned[..., None]), "page lists have holes"
            assert (state.lengths <= state.owned * self.page_size).all(), "slots without pages"
            written = state.lengths // self.page_size  # whole pages
            private = state.pages[(columns >= written[..., None]) & (state.pages >= 0)]
            assert self._pool.is_private(private), "a page that may be written is shared"

    # inside

    def _new(self) -> _Sequence:
        heads = (self.layers, self.kv_heads)
        return _Sequence(
            np.empty((*heads, 0), np.int32),
            np.zeros(heads, np.int32),
            np.zeros(heads, np.int32),
            np.empty((1, 1, 0), np.int32),
            np.empty((1, 1, 0), np.int32),
        )

    def _missing(self, state: _Sequence, slots: int) -> IntArray:
        needed = -(-(state.lengths + slots) // self.page_size)
        missing: IntArray = np.maximum(needed - state.owned, 0)
        return missing

    def _demand(self, pages: int) -> None:
        if pages > self.free_pages:
            raise OutOfPages(f"Expected {pages} free KV pages, but got {self.free_pages}")

    def _grow(self, state: _Sequence, missing: IntArray) -> None:
        """Add `missing` fresh pages to each head; taken together, so that each head gets a run of its own."""
        target = state.owned + missing
        width = int(target.max())
        if width > state.pages.shape[2]:
            state.pages = _widened(state.pages, width, -1)
        columns = np.arange(state.pages.shape[2])
        mask = (columns >= state.owned[..., None]) & (columns < target[..., None])
        state.pages[mask] = self._pool.take(int(missing.sum()))
        state.owned = target.astype(np.int32)

    def _grow_metadata(self, state: _Sequence, slots: int) -> None:
        if slots > state.order.shape[2]:
            state.order = _widened(state.order, slots, 0)
            state.position = _widened(state.position, slots, 0)

    def _flat(self, state: _Sequence, index: SlotArray) -> SlotArray:
        """Flat slots of slot indices [layers, heads, n]."""
        if state.pages.shape[2] == 0:
            return np.zeros(index.shape, np.int64)
        page, offset = np.divmod(index, self.page_size)
        pages = np.take_along_axis(state.pages, page, axis=2).astype(np.int64)
        return pages * self.page_size + offset

    def _address(self, pages: Pages, index: SlotArray) -> SlotArray:
        """Flat slots of slot indices within one head's pages."""
        return pages.astype(np.int64)[index // self.page_size] * self.page_size + index % self.page_size

    def _row(self, field: IntArray, layer: int, head: int) -> IntArray:
        row: IntArray = field[0, 0] if field.shape[0] == 1 else field[layer, head]
        return row


def _widened(array: IntArray, width: int, fill: int) -> IntArray:
    """A copy whose last axis is at least doubled to hold `width`, so that growth stays cheap."""
    wider = np.full((*array.shape[:2], max(width, 2 * array.shape[2])), fill, np.int32)
    wider[..., : array.shape[2]] = array
    return wider
