"""Any sequence of KV operations against a model of plain lists: contents survive, pages are conserved.

Run with `pytest tests/property/test_kv.py`. What no sequence and no cache owns is NaN at every moment.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from mmserve.kv.identity import Identity, identity_rows
from mmserve.kv.prefix import PrefixCache
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, OutOfPages, PageTable, SlotArray
from mmserve.models.rope import rope_angles, rope_frequencies, rotate

NAMES = st.sampled_from(["a", "b", "c"])
LAYERS, HEADS, PAGE_SIZE, PAGES, WIDTH = 2, 2, 4, 60, 4
KEYS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
FREQUENCIES = rope_frequencies(WIDTH, 100.0)
Slot = tuple[int, int, int]  # order, position, what it holds
Content = dict[tuple[int, int], list[Slot]]


def span(start: int, stop: int) -> IntArray:
    return np.arange(start, stop, dtype=np.int32)


def values(held: NDArray[np.int64]) -> torch.Tensor:
    """A vector of its own for everything a slot may hold, fp32 [..., WIDTH]."""
    return torch.from_numpy(np.stack([held % 997, held // 997, held % 13, held % 7 + 1], -1)).float() / 100


def keys(held: NDArray[np.int64], position: IntArray) -> torch.Tensor:
    """Rotated keys of slots [n]."""
    angles = rope_angles(torch.from_numpy(position), FREQUENCIES, torch.float32)
    return rotate(values(held)[:, None], *angles)[:, 0]


def prompt(salt: int, tokens: list[int]) -> Identity:
    order = span(0, len(tokens))
    rows = identity_rows(held=np.array(tokens, np.int64), order=order, position=order)
    return Identity(bytes([salt]), b"", rows)


class KVMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(LAYERS, HEADS, PAGES, PAGE_SIZE)
        self.store = PageStore(PAGES, PAGE_SIZE, WIDTH)
        self.cache = PrefixCache(self.table, 7 * LAYERS * HEADS, self.store.page_bytes)
        self.model: dict[str, Content] = {}
        self.prompts: dict[str, Identity] = {}  # of sequences whose first slots are still those of a prompt
        self.prefixes: dict[tuple[int, ...], int] = {}  # what the slot after these tokens of a tenant holds
        self.next = 1

    # growing

    @rule(name=NAMES, count=st.integers(0, 9))
    def append(self, name: str, count: int) -> None:
        position = span(0, count)
        held = np.arange(count) + self.next
        fits = self.table.can_append(name, count)
        try:
            self.extend(name, span(self.next, self.next + count), position, held)
        except OutOfPages:
            assert not fits
            return
        assert fits
        self.next += count

    @rule(name=NAMES, count=st.integers(0, 9), layer=st.integers(0, LAYERS - 1))
    def append_to_a_layer(self, name: str, count: int, layer: int) -> None:
        if self.table.can_append(name, count):
            order, held = span(self.next, self.next + count), np.arange(count) + self.next
            self.extend(name, order, span(0, count), held, range(layer, layer + 1))
            self.next += count

    @precondition(lambda self: self.model)
    @rule(data=st.data(), slots=st.integers(0, 9), layer=st.integers(0, LAYERS - 1), unite=st.booleans())
    def trim(self, data: st.DataObject, slots: int, layer: int, unite: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        if unite:
            self.table.unite(name)
        self.table.trim(name, slots, range(layer, LAYERS))
        taken = self.table.pages(name)[layer:] >= 0
        most = -(-(self.table.lengths(name)[layer:] + slots) // PAGE_SIZE)
        assert (taken.sum(2) <= most).all()

    def extend(
        self,
        name: str,
        order: IntArray,
        position: IntArray,
        held: NDArray[np.int64],
        layers: range | None = None,
    ) -> None:
        """Append and write; a head's slot holds what the position in the model says and the head."""
        slots = self.table.append(name, order, position, layers)
        assert np.array_equal(slots, self.table.tail(name, len(order), layers))
        content = self.model.setdefault(name, {key: [] for key in KEYS})
        for number, (layer, head) in enumerate(KEYS):
            if layers is not None and layer not in layers:
                continue
            own = held * len(KEYS) + number
            new = slots[layer - (layers.start if layers else 0), head]
            self.is_private(new)
            self.store.write(new, keys(own, position), values(own))
            content[layer, head] += zip(order.tolist(), position.tolist(), own.tolist(), strict=True)

    @rule(name=NAMES, count=st.integers(0, 9))
    def reserve(self, name: str, count: int) -> None:
        if name in self.model and self.table.can_append(name, count):
            self.table.reserve(name, count)

    @rule(
        name=NAMES,
        salt=st.sampled_from([0, 0, 0, 1]),
        fork_at=st.sampled_from([3, 9, 14, 14]),
        length=st.sampled_from([3, 8, 9, 13, 14]),
        insert=st.booleans(),
    )
    def prefill(self, name: str, salt: int, fork_at: int, length: int, insert: bool) -> None:
        """A prompt that shares its first `fork_at` tokens with all others of its tenant."""
        if name in self.model:
            self.release_one(name)
        tokens = [token if token < fork_at else 100 * fork_at + token for token in range(length)]
        identity = prompt(salt, tokens)
        held = [
            self.prefixes.setdefault((salt, *tokens[: end + 1]), 10_000 + len(self.prefixes))
            for end in range(length)
        ]
        found = self.cache.match(identity, length - 1)
        if found:
            self.cache.take(name, identity, found)
            self.model[name] = {
                key: [(i, i, held[i] * len(KEYS) + number) for i in range(found)]
                for number, key in enumerate(KEYS)
            }
        lacking = self.table.pages_for(length) - self.table.pages_for(found) - self.table.free_pages
        if lacking > 0:
            self.cache.evict(lacking)
        rest = span(found, length)
        try:
            self.extend(name, rest, rest, np.array(held[found:], np.int64))
        except OutOfPages:
            assert self.cache.evictable_pages < lacking or lacking <= 0
            if found:
                self.release_one(name)
            return
        self.prompts[name] = identity
        if insert:
            self.insert(name)

    # changing

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        name, (layer, head) = self.draw_head(data)
        slots = self.model[name][layer, head]
        mask = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        chosen: SlotArray = np.flatnonzero(np.array(mask, bool))
        try:
            moves = self.table.keep(name, layer, head, chosen)
        except OutOfPages:
            return
        self.is_private(moves.destination)
        self.store.copy(*moves)
        self.model[name][layer, head] = [slots[i] for i in chosen]
        if len(chosen) < len(slots):
            self.prompts.pop(name, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rerotate(self, data: st.DataObject) -> None:
        name, (layer, head) = self.draw_head(data)
        slots = self.model[name][layer, head]
        deltas = data.draw(st.lists(st.integers(-9, 9), min_size=len(slots), max_size=len(slots)))
        try:
            turns = self.table.rerotate(name, layer, head, np.array(deltas, np.int32))
        except OutOfPages:
            return
        self.is_private(turns.destination)
        self.store.rerotate(turns, FREQUENCIES)
        self.model[name][layer, head] = [
            (order, position + delta, held)
            for (order, position, held), delta in zip(slots, deltas, strict=True)
        ]
        self.prompts.pop(name, None)

    def draw_head(self, data: st.DataObject) -> tuple[str, tuple[int, int]]:
        return data.draw(st.sampled_from(sorted(self.model))), data.draw(st.sampled_from(KEYS))

    # copying and forgetting

    @precondition(lambda self: self.model)
    @rule(data=st.data(), child=NAMES, through_export=st.booleans())
    def fork(self, data: st.DataObject, child: str, through_export: bool) -> None:
        parent = data.draw(st.sampled_from(sorted(self.model)))
        if child in self.model:
            return
        try:
            if through_export:
                self.store.import_(self.table, child, self.store.export(self.table, parent))
            else:
                moves = self.table.fork(parent, child)
                self.is_private(moves.destination)
                self.store.copy(*moves)
        except OutOfPages:
            assert child not in self.table
            return
        self.model[child] = {key: list(slots) for key, slots in self.model[parent].items()}
        if parent in self.prompts:
            self.prompts[child] = self.prompts[parent]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(sorted(self.model))))

    def release_one(self, name: str) -> None:
        self.table.release(name)
        del self.model[name]
        self.prompts.pop(name, None)

    # the prefix cache

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def insert_later(self, data: st.DataObject) -> None:
        self.insert(data.draw(st.sampled_from(sorted(self.prompts))))

    def insert(self, name: str) -> None:
        slots = len(self.prompts[name].rows)
        self.cache.insert(name, self.prompts[name], slots)
        # there is always room for a chain as short as these: what is older goes
        assert self.cache.match(self.prompts[name], slots) == slots // PAGE_SIZE * PAGE_SIZE

    @precondition(lambda self: self.cache.held_pages)
    @rule(pages=st.integers(0, 30))
    def evict(self, pages: int) -> None:
        free, evictable = self.table.free_pages, self.cache.evictable_pages
        freed = self.cache.evict(pages)
        assert self.table.free_pages == free + freed
        assert min(pages, evictable) <= freed <= evictable

    @precondition(lambda self: self.cache.held_pages)
    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def share_and_drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        full = len(self.prompts[name].rows) // PAGE_SIZE
        first = data.draw(st.integers(0, full))
        pages = self.table.share(name, first, full - first)
        self.table.check([*self.cache.pages, pages])
        assert not self.table.is_unshared(pages).any()
        self.table.drop(pages)

    # what always holds

    def is_private(self, slots: SlotArray) -> None:
        """Assert that the pages of these slots, about to be written, have one owner."""
        owners = Counter(self.cache.pages.flatten().tolist())
        for name in self.model:
            for layer in range(LAYERS):
                found = self.table.slots(name, layer)
                owners.update(np.unique(found[found >= 0] // PAGE_SIZE).tolist())
        assert all(owners[page] <= 1 for page in np.unique(slots // PAGE_SIZE).tolist())

    @invariant()
    def pages_are_conserved(self) -> None:
        self.table.check([self.cache.pages])
        assert self.table.free_pages + self.table.used_pages == PAGES
        assert self.cache.held_pages <= 7 * LAYERS * HEADS
        assert self.model or self.table.used_pages == self.cache.held_pages == self.cache.evictable_pages

    @invariant()
    def contents_survive(self) -> None:
        self.poison()
        for name, content in self.model.items():
            lengths, (first, length) = self.table.lengths(name), self.table.runs(name)
            for (layer, head), expected in content.items():
                assert lengths[layer, head] == len(expected)
                order, position, held = np.array(expected, np.int64).reshape(-1, 3).T
                slots = self.table.slots(name, layer)[head]
                assert (slots[len(expected) :] == -1).all()
                slots = slots[: len(expected)]
                pairs = zip(first[:, layer, head], length[:, layer, head], strict=True)
                runs = [np.arange(start, start + count) for start, count in pairs]
                assert np.array_equal(np.concatenate([*runs, np.empty(0, np.int64)]), slots)
                assert np.array_equal(self.table.order(name, layer, head), order)
                assert np.array_equal(self.table.position(name, layer, head), position)
                k, v = self.store.read(slots)
                assert torch.equal(v, values(held))
                assert torch.allclose(k, keys(held, position.astype(np.int32)), rtol=1e-4, atol=1e-4)

    def poison(self) -> None:
        """NaN into every slot that holds nothing."""
        empty = np.ones(PAGES * PAGE_SIZE, bool)
        empty.reshape(PAGES, PAGE_SIZE)[self.cache.pages.flatten()] = False
        for name in self.model:
            for layer in range(LAYERS):
                found = self.table.slots(name, layer)
                empty[found[found >= 0]] = False
        nan = torch.full((int(empty.sum()), WIDTH), torch.nan)
        self.store.write(np.flatnonzero(empty), nan, nan)


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
