"""Which pages hold the KV of which sequence: one list of pages per layer and KV head.

Everything is vectorised over layers and heads. Knows nothing about tensors: `PageStore` holds the
contents, and the flat slots returned here (page * page_size + offset) address it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.errors import MMServeError
from mmserve.kv.pool import PagePool, Pages
from mmserve.kv.sequence import ALL, Runs, SequenceState
from mmserve.kv.sequence import IntArray as IntArray
from mmserve.kv.sequence import SlotArray as SlotArray

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


class Turns(NamedTuple):
    """`Moves` on which keys also turn: each by `delta` positions."""

    source: SlotArray
    destination: SlotArray
    delta: IntArray


class PageTable:
    """Page lists, slot orders and RoPE positions of every sequence.

    Invariants: a page has one place in at most one head of a sequence; a page with several owners is
    full and is never written; a head owns the pages of its slots and those it reserved. `axes` is the
    number of RoPE positions per slot; with 1, positions are [n], otherwise [n, axes].
    """

    def __init__(
        self, layers: int, kv_heads: int, num_pages: int, page_size: int = 32, axes: int = 1
    ) -> None:
        self.layers = layers
        self.kv_heads = kv_heads
        self.num_pages = num_pages
        self.page_size = page_size
        self.axes = axes
        self._pool = PagePool(num_pages)
        self._sequences: dict[str, SequenceState] = {}

    @property
    def free_pages(self) -> int:
        return self._pool.free

    @property
    def used_pages(self) -> int:
        return self.num_pages - self._pool.free

    def pages_for(self, slots: int) -> int:
        """Pages that a new sequence of `slots` slots in every head takes."""
        return self.layers * self.kv_heads * -(-slots // self.page_size)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def owners(self, pages: Pages) -> NDArray[np.int32]:
        """How many sequences and caches hold each of these pages."""
        return self._pool.owners(pages)

    def __contains__(self, sequence: str) -> bool:
        return sequence in self._sequences

    # growing

    def can_append(self, sequence: str | None, slots: int) -> bool:
        """Whether `slots` more slots per head fit; None stands for a new sequence."""
        if sequence is None or sequence not in self._sequences:
            return self.pages_for(slots) <= self.free_pages
        state = self._sequences[sequence]
        return slots <= state.room or int(state.missing(slots).sum()) <= self.free_pages

    def missing_pages(self, sequence: str, slots: int) -> int:
        """Pages that `slots` more slots per head of a sequence take; a new one is created by taking them."""
        state = self._sequences.get(sequence)
        if state is None:
            return self.pages_for(slots)
        return 0 if slots <= state.room else int(state.missing(slots).sum())

    def reserve(self, sequence: str, slots: int, layers: range | None = None) -> None:
        """Own pages for `slots` more slots per head, contiguous where possible; creates the sequence."""
        state = self._sequences.get(sequence) or self._new()
        if slots > state.room:
            missing = state.missing(slots, self._part(layers))
            if missing.any():
                self._grow(state, missing)
        self._sequences[sequence] = state

    def trim(self, sequence: str, slots: int, layers: range | None = None) -> None:
        """Give back what these layers, or all, own beyond `slots` more slots per head."""
        self._pool.release(self._sequences[sequence].trim(slots, self._part(layers)))

    def append(
        self, sequence: str, order: IntArray, position: IntArray, layers: range | None = None
    ) -> SlotArray:
        """New slots at the end of every head: flat slots [layers, kv_heads, n]. Creates the sequence.

        With `layers` only theirs: heads of other layers are behind, or have other slots.
        """
        assert order.ndim == 1, "order is one value per slot"
        position, part = self._with_axes(position, len(order)), self._part(layers)
        self.reserve(sequence, len(order), layers)
        state = self._sequences[sequence]
        state.append(order, position, part)
        return state.tail(len(order), part)

    def unite(self, sequence: str) -> None:
        """Forget that layers were appended to apart, if all heads turn out alike."""
        self._sequences[sequence].unite()

    def restore(self, sequence: str, lengths: IntArray, order: IntArray, position: IntArray) -> SlotArray:
        """A new sequence with these `lengths` [layers, kv_heads]; returns its flat slots [sum of lengths].

        Slots, `order` and `position` are head after head, layer after layer; these two are of one head where
        they are as short.
        """
        assert sequence not in self._sequences, f"sequence {sequence} exists"
        state = self._new()
        state.lengths = lengths.astype(np.int32)
        self._grow(state, state.missing(0))
        self._sequences[sequence] = state
        index = np.broadcast_to(np.arange(state.longest), (*lengths.shape, state.longest))
        mask = index < lengths[..., None]
        state.order = np.zeros(mask.shape, np.int32)
        state.position = np.zeros((*mask.shape, self.axes), np.int32)
        times = lengths.size if len(order) < lengths.sum() else 1
        state.order[mask] = np.tile(order, times)
        state.position[mask] = np.tile(self._with_axes(position, len(order)), (times, 1))
        state.unite()
        return state.flat(np.where(mask, index, 0))[mask]

    # reading

    def lengths(self, sequence: str) -> IntArray:
        """Slots per head, int32 [layers, kv_heads]."""
        return self._sequences[sequence].lengths.copy()

    def pages(self, sequence: str) -> Pages:
        """Pages of every head with those reserved, int32 [layers, kv_heads, most], padded with -1; a view."""
        state = self._sequences[sequence]
        return state.pages[:, :, : int(state.owned.max())]

    def version(self, sequence: str) -> int:
        """Says which `pages` they are: as long as it is the same, so are they."""
        return self._sequences[sequence].version

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

    def tail(self, sequence: str, count: int, layers: range | None = None) -> SlotArray:
        """Flat slots of the last `count` slots of every head, int64 [layers, kv_heads, count]."""
        state, part = self._sequences[sequence], self._part(layers)
        assert int(state.lengths[part].min()) >= count, "a head has fewer slots"
        return state.tail(count, part)

    def runs(self, sequence: str) -> Runs:
        """Where the slots of every head lie: one run if all was reserved at once and nothing was dropped."""
        return self._sequences[sequence].runs()

    def orders(self, sequence: str, layer: int) -> IntArray:
        """Orders of one layer's slots, int32 [kv_heads, longest] padded with `NO_ORDER`; [1, n] if alike."""
        state = self._sequences[sequence]
        if state.is_alike:
            return state.order[0, :, : state.longest]
        lengths = state.lengths[layer]
        longest = int(lengths.max())
        return np.where(np.arange(longest) < lengths[:, None], state.order[layer, :, :longest], NO_ORDER)

    def order(self, sequence: str, layer: int, head: int) -> IntArray:
        """Index of each slot in the uncompressed prompt, int32 [length]."""
        state = self._sequences[sequence]
        return self._row(state.order, layer, head)[: state.lengths[layer, head]].copy()

    def position(self, sequence: str, layer: int, head: int) -> IntArray:
        """RoPE position with which each slot's key was rotated, int32 [length] or [length, axes]."""
        state = self._sequences[sequence]
        rows = self._row(state.position, layer, head)[: state.lengths[layer, head]].copy()
        return rows[:, 0] if self.axes == 1 else rows

    def places(self, sequence: str) -> tuple[IntArray, IntArray]:
        """Orders and positions of all slots, head after head, layer after layer; if alike, of one head."""
        heads = list(np.ndindex(self.layers, self.kv_heads))
        if self._sequences[sequence].is_alike:
            heads = heads[:1]
        return (
            np.concatenate([self.order(sequence, *head) for head in heads]),
            np.concatenate([self.position(sequence, *head) for head in heads]),
        )

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
        elif self._pool.is_unshared(old).all():
            pages, gone = old[:need], old[need:]
        else:
            raise OutOfPages(f"Expected {need} free KV pages to keep, but got {self.free_pages}")
        self._pool.release(gone)
        state.replace(layer, head, pages, slots)
        return Moves(self._address(old, slots), self._address(pages, np.arange(len(slots))))

    def compact(self, sequence: str, start: int, kept: SlotArray) -> Moves:
        """Of the slots from `start` on keep only these (ascending indices) in every head, all heads alike.

        Survivors move to the front of where they lie, which nobody else may share; all pages stay.
        """
        state = self._sequences[sequence]
        assert (np.diff(kept) > 0).all(), "kept slots ascend"
        inside = len(kept) == 0 or (kept[0] >= start and kept[-1] < state.longest)
        assert inside, "a kept slot does not exist"
        target = np.arange(start, start + len(kept))
        moved = kept != target
        heads = (self.layers, self.kv_heads, int(moved.sum()))
        source, destination = (
            state.flat(np.broadcast_to(index[moved], heads)).reshape(-1) for index in (kept, target)
        )
        shared = np.unique(destination // self.page_size).astype(np.int32)
        assert self._pool.is_unshared(shared).all(), "a page that is written is shared"
        state.compact(start, kept)
        return Moves(source, destination)

    def rerotate(self, sequence: str, layer: int, head: int | None, delta: int | IntArray) -> Turns:
        """Move the slots of a head (None: of every head of the layer) to fresh pages and other positions.

        `delta` is what to add to each slot's position, on every axis. What the heads had reserved is
        given back. The source is never written, so no key is turned twice, whoever shares it.
        """
        state = self._sequences[sequence]
        heads = range(self.kv_heads) if head is None else [head]
        need = -(-state.lengths[layer] // self.page_size)
        self._demand(int(sum(need[one] for one in heads)))
        turns = []
        for one in heads:
            slots = np.arange(state.lengths[layer, one])
            old = state.pages[layer, one, : state.owned[layer, one]].copy()
            pages = self._pool.take(int(need[one]))
            state.replace(layer, one, pages, slots)
            deltas = np.broadcast_to(np.asarray(delta, np.int32), slots.shape)
            state.position[layer, one, : len(slots)] += deltas[:, None]
            turns.append(Turns(self._address(old, slots), self._address(pages, slots), deltas))
            self._pool.release(old)
        return Turns(*(np.concatenate(parts) for parts in zip(*turns, strict=True)))

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
        state.lengths = old.lengths.copy()
        state.order, state.position = old.order.copy(), old.position.copy()
        self._pool.share(state.held)
        self._grow(state, partial)
        self._sequences[child] = state
        offsets = np.arange(self.page_size)
        index = np.minimum(full[..., None] * self.page_size + offsets, old.lengths[..., None] - 1)
        mask = offsets < rest[..., None]
        index = np.maximum(index, 0)
        return Moves(old.flat(index)[mask], state.flat(index)[mask])

    def release(self, sequence: str) -> None:
        """Give up every page of a sequence and forget it."""
        self._pool.release(self._sequences.pop(sequence).held)

    # pages without a sequence, as a prefix cache holds them: [layers, kv_heads, n]

    def share(self, sequence: str, first_page: int, count: int) -> Pages:
        """Full pages of a sequence whose heads are alike; the caller owns them too, until `drop`."""
        state, slots = self._sequences[sequence], (first_page + count) * self.page_size
        assert slots <= int(state.lengths.min()), "a shared page is full"
        orders = state.order[..., :slots]
        assert (orders == orders[:1, :1]).all(), "heads have lost different slots"
        pages = state.pages[:, :, first_page : first_page + count].copy()
        self._pool.share(pages.reshape(-1))
        return pages

    def adopt(self, sequence: str, pages: Pages, order: IntArray, position: IntArray) -> None:
        """A new sequence whose first slots are these shared, full pages; the caller keeps its own share."""
        assert sequence not in self._sequences, f"sequence {sequence} exists"
        count = pages.shape[2]
        assert pages.shape == (self.layers, self.kv_heads, count), "pages are [layers, kv_heads, n]"
        assert order.shape == (count * self.page_size,), "adopted pages are full"
        state = self._new()
        state.grow(np.full(pages.shape[:2], count, np.int32), pages.reshape(-1))
        state.append(order, self._with_axes(position, len(order)))
        self._pool.share(pages.reshape(-1))
        self._sequences[sequence] = state

    def drop(self, pages: Pages) -> None:
        """Give up what `share` returned; pages without another owner become free."""
        self._pool.release(pages.reshape(-1))

    def is_unshared(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of these pages `drop` would free."""
        return self._pool.is_unshared(pages)

    def check(self, extra_owners: Iterable[Pages] = ()) -> None:
        """Assert the invariants; for tests and idle moments. `extra_owners` holds what `share` returned."""
        owned = [state.held for state in self._sequences.values()]
        self._pool.check([*owned, *(pages.reshape(-1) for pages in extra_owners)])
        for state in self._sequences.values():
            columns = np.arange(state.pages.shape[2])
            assert np.array_equal(state.pages >= 0, columns < state.owned[..., None]), "page lists have holes"
            assert (state.lengths <= state.owned * self.page_size).all(), "slots without pages"
            written = state.lengths // self.page_size  # whole pages
            private = state.pages[(columns >= written[..., None]) & (state.pages >= 0)]
            assert self._pool.is_unshared(private).all(), "a page that may be written is shared"

    # inside

    def _part(self, layers: range | None) -> slice:
        if layers is None or len(layers) == self.layers:
            return ALL
        return slice(layers.start, layers.stop)

    def _new(self) -> SequenceState:
        return SequenceState.empty(self.layers, self.kv_heads, self.page_size, self.axes)

    def _demand(self, pages: int) -> None:
        if pages > self.free_pages:
            raise OutOfPages(f"Expected {pages} free KV pages, but got {self.free_pages}")

    def _grow(self, state: SequenceState, missing: IntArray) -> None:
        """Add `missing` fresh pages to each head; taken together, so that each head gets a run of its own."""
        count = int(missing.sum())
        self._demand(count)
        state.grow(missing, self._pool.take(count))

    def _with_axes(self, position: IntArray, slots: int) -> IntArray:
        """Positions as [slots, axes]; with one axis, [slots] stands for [slots, 1]."""
        expected = (slots,) if self.axes == 1 else (slots, self.axes)
        assert position.shape == expected, f"positions are of shape {expected}"
        return position.reshape(slots, self.axes)

    def _address(self, pages: Pages, index: SlotArray) -> SlotArray:
        """Flat slots of slot indices within one head's pages."""
        return pages.astype(np.int64)[index // self.page_size] * self.page_size + index % self.page_size

    def _row(self, field: IntArray, layer: int, head: int) -> IntArray:
        row: IntArray = field[0, 0] if field.shape[:2] == (1, 1) else field[layer, head]
        return row
