"""EmbeddingCache: least recently used goes first, and bytes always add up."""

from __future__ import annotations

from collections import OrderedDict

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers.record import Entry
from tests.encoders.entries import ROW_BYTES, entry, key


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = EmbeddingCache(5 * ROW_BYTES)
    cache.put(key(1), entry(2))
    cache.put(key(2), entry(2))
    assert cache.get(key(1)) is not None
    cache.put(key(3), entry(2))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None
    assert cache.stats() == (2, 4 * ROW_BYTES, 5 * ROW_BYTES, 2, 1, 1, ())


def test_what_is_larger_than_the_cache_is_not_stored() -> None:
    cache = EmbeddingCache(2 * ROW_BYTES)
    cache.put(key(1), entry(1))
    cache.put(key(2), entry(3))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None


def test_a_row_of_a_batch_is_stored_as_its_own_memory() -> None:
    batch = torch.zeros(4, 2, 3)
    cache = EmbeddingCache(100 * ROW_BYTES)
    cache.put(key(1), Entry(batch[1], batch[1, :, 0]))
    batch[:] = 1.0
    found = cache.get(key(1))
    assert found is not None
    assert found.embeddings.untyped_storage().nbytes() == 2 * 3 * 4
    assert float(found.embeddings.sum()) == 0.0


def test_a_flood_evicts_only_its_own_tenant() -> None:
    """R18."""
    cache = EmbeddingCache(8 * ROW_BYTES)
    for name in range(3):
        cache.put(key(name), entry(1), tenant="quiet")
    for name in range(100, 200):
        cache.put(key(name), entry(2), tenant="loud")
    assert len(cache.get_many([key(name) for name in range(3)], tenant="quiet")) == 3
    assert cache.get(key(199), tenant="loud") is not None


def test_shares_of_equal_tenants_end_equal() -> None:
    cache = EmbeddingCache(8 * ROW_BYTES)
    for name in range(8):
        cache.put(key(name), entry(1), tenant="first")
    for name in range(100, 120):
        cache.put(key(name), entry(1), tenant="second")
    assert len(cache.get_many([key(name) for name in range(8)])) == 4


def test_an_entry_of_another_size_is_a_miss() -> None:
    """R17."""
    cache = EmbeddingCache(8 * ROW_BYTES)
    cache.put(key(1), entry(2))
    assert cache.get(key(1), tokens=3) is None
    assert cache.get(key(1), tokens=2) is not None
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


CAPACITY = 7 * ROW_BYTES


class CacheMachine(RuleBasedStateMachine):
    """Against an ordered dictionary that evicts by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = EmbeddingCache(CAPACITY)
        self.model: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self.value = 0.0

    @rule(name=st.integers(0, 5), tokens=st.integers(0, 9))
    def put(self, name: int, tokens: int) -> None:
        self.value += 1.0
        self.cache.put(key(name), entry(tokens, self.value))
        self.model.pop(name, None)
        if tokens * ROW_BYTES > CAPACITY:
            return
        while sum(t for t, _ in self.model.values()) + tokens > 7:
            self.model.popitem(last=False)
        self.model[name] = (tokens, self.value)

    @rule(name=st.integers(0, 5))
    def get(self, name: int) -> None:
        found = self.cache.get(key(name))
        assert (found is not None) == (name in self.model)
        if found is not None:
            self.model.move_to_end(name)
            tokens, value = self.model[name]
            assert torch.equal(found.embeddings, torch.full((tokens, 3), value))

    @invariant()
    def bytes_add_up(self) -> None:
        stats = self.cache.stats()
        assert stats.entries == len(self.model)
        assert stats.used_bytes == sum(t for t, _ in self.model.values()) * ROW_BYTES <= CAPACITY


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=50, deadline=None)
