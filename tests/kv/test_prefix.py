"""PrefixCache: what it finds, that a hash alone is no hit, and what goes first when room is short."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from mmserve.kv import identity as identities
from mmserve.kv.identity import KEY_BYTES, Identity, identity_rows, orders_of, positions_of
from mmserve.kv.prefix import PrefixCache
from mmserve.kv.table import PageTable

LAYERS, HEADS, SIZE = 2, 2, 4
BLOCK = LAYERS * HEADS  # pages of one


def text(*tokens: int, salt: bytes = b"a", settings: bytes = b"dense") -> Identity:
    """A prompt without media."""
    span = np.arange(len(tokens), dtype=np.int32)
    rows = identity_rows(held=np.array(tokens, np.int64), order=span, position=span)
    return Identity(salt, settings, rows)


def prefill(table: PageTable, name: str, prompt: Identity) -> None:
    rows = prompt.rows
    table.append(name, orders_of(rows), positions_of(rows, table.axes))


def cached(cache: PrefixCache, table: PageTable, prompt: Identity, name: str = "x") -> None:
    """Prefill, insert and release."""
    prefill(table, name, prompt)
    cache.insert(name, prompt, len(prompt.rows))
    table.release(name)


def new(pages: int = 200, max_pages: int = 100) -> tuple[PageTable, PrefixCache]:
    table = PageTable(LAYERS, HEADS, pages, SIZE)
    return table, PrefixCache(table, max_pages, page_bytes=64)


def test_the_longest_prefix_of_whole_pages_is_found() -> None:
    table, cache = new()
    prefill(table, "a", text(*range(11)))
    cache.insert("a", text(*range(11)), 11)
    assert cache.held_pages == 2 * BLOCK
    assert cache.bytes == 2 * BLOCK * 64
    assert cache.evictable_pages == 0
    slots = table.slots("a", 1)[:, :8].tolist()
    table.release("a")
    assert cache.evictable_pages == 2 * BLOCK
    assert cache.match(text(*range(20)), 19) == 8
    assert cache.match(text(*range(8)), 7) == 4
    assert cache.match(text(*range(7), 9, 9), 8) == 4
    assert cache.match(text(9, *range(1, 9)), 8) == 0
    cache.take("b", text(*range(20)), 8)
    assert table.slots("b", 1).tolist() == slots
    assert table.order("b", 0, 0).tolist() == list(range(8))
    assert (cache.queries, cache.hits, cache.hit_slots) == (4, 1, 8)
    table.check([cache.pages])


def test_only_what_is_new_is_shared() -> None:
    table, cache = new()
    cached(cache, table, text(*range(8)))
    cache.take("b", text(*range(16)), 8)
    table.append("b", np.arange(8, 16, dtype=np.int32), np.arange(8, 16, dtype=np.int32))
    cache.insert("b", text(*range(16)), 16)
    assert cache.held_pages == 4 * BLOCK == table.used_pages
    cached(cache, table, text(*range(16)))
    assert cache.held_pages == 4 * BLOCK == table.used_pages
    table.check([cache.pages])


def test_tenants_and_settings_never_share() -> None:
    table, cache = new()
    cached(cache, table, text(*range(8)))
    assert cache.match(text(*range(8)), 8) == 8
    assert cache.match(text(*range(8), salt=b"b"), 8) == 0
    assert cache.match(text(*range(8), settings=b"sparse"), 8) == 0
    # the border between salt and settings counts
    assert cache.match(text(*range(8), salt=b"ad", settings=b"ense"), 8) == 0


class SameDigest:
    """A hash function under which everything collides."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def digest(self) -> bytes:
        return b"same"


def test_a_hash_is_only_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "blake2b", SameDigest)
    table, cache = new()
    cached(cache, table, text(1, 2, 3, 4))
    assert cache.match(text(1, 2, 3, 4), 4) == 4
    for other in (text(1, 2, 3, 5), text(1, 2, 3, 4, salt=b"b"), text(1, 2, 3, 4, settings=b"")):
        assert cache.match(other, 4) == 0
        cached(cache, table, other)
    # the second block collides with the first
    cached(cache, table, text(1, 2, 3, 4, 1, 2, 3, 4))
    assert cache.match(text(1, 2, 3, 4, 1, 2, 3, 4), 8) == 4
    assert cache.held_pages == BLOCK
    table.check([cache.pages])


class LastBlockDigest:
    """A hash function that forgets what came before a block."""

    def __init__(self, data: bytes, **_: object) -> None:
        self.data = data[16:]

    def digest(self) -> bytes:
        return sha256(self.data).digest()[:16]


def test_a_block_counts_only_under_its_own_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "blake2b", LastBlockDigest)
    table, cache = new()
    cached(cache, table, text(1, 2, 3, 4, 5, 6, 7, 8))
    cached(cache, table, text(9, 9, 9, 9, 5, 6, 7, 8))
    assert cache.match(text(9, 9, 9, 9, 5, 6, 7, 8), 8) == 4
    assert cache.match(text(1, 2, 3, 4, 5, 6, 7, 8), 8) == 8
    assert cache.held_pages == 3 * BLOCK


def test_the_oldest_leaf_goes_first() -> None:
    table, cache = new()
    cached(cache, table, text(*range(12)))
    cached(cache, table, text(*range(4), *range(50, 54)))
    assert cache.held_pages == 4 * BLOCK
    cache.take("x", text(*range(12)), 12)
    table.release("x")
    assert cache.evict(1) == BLOCK
    assert cache.match(text(*range(4), *range(50, 54)), 8) == 4
    assert cache.evict(BLOCK + 1) == 2 * BLOCK
    assert cache.match(text(*range(12)), 12) == 4
    assert cache.evicted_blocks == 3
    assert cache.evict(1000) == BLOCK
    assert cache.evict(1) == 0
    assert table.free_pages == 200


def test_blocks_in_use_stay_while_others_can_go() -> None:
    table, cache = new()
    cached(cache, table, text(*range(8)))
    cache.take("a", text(*range(8)), 8)
    cached(cache, table, text(*range(20, 28)))
    assert cache.evictable_pages == 2 * BLOCK
    assert cache.evict(2 * BLOCK) == 2 * BLOCK
    assert cache.match(text(*range(8)), 8) == 8
    assert cache.evict(1) == 0
    assert cache.held_pages == 2 * BLOCK


def test_a_used_child_goes_when_its_unused_parent_has_to() -> None:
    table, cache = new()
    prefill(table, "a", text(*range(8)))  # computed without the cache
    cached(cache, table, text(*range(4)))
    cache.insert("a", text(*range(8)), 8)
    assert cache.held_pages == 2 * BLOCK
    assert cache.evictable_pages == BLOCK
    assert cache.evict(BLOCK) == BLOCK
    assert cache.held_pages == 0
    assert table.used_pages == 2 * BLOCK
    table.check()


def test_the_budget_holds_and_the_old_make_room() -> None:
    table, cache = new(max_pages=3 * BLOCK + 1)
    cached(cache, table, text(*range(8)))
    cached(cache, table, text(*range(20, 28)))
    assert cache.held_pages == 3 * BLOCK
    assert cache.match(text(*range(8)), 8) == 4
    assert cache.match(text(*range(20, 28)), 8) == 8
    # a chain longer than the budget is cached as far as it goes, and does not evict itself
    cached(cache, table, text(*range(40, 60)))
    assert cache.match(text(*range(40, 60)), 20) == 12
    cached(cache, table, text(*range(40, 60)))
    assert cache.held_pages == 3 * BLOCK
    assert cache.evicted_blocks == 4
    cache.clear()
    assert cache.held_pages == cache.bytes == 0
    assert table.free_pages == 200


def test_a_cache_without_room_holds_nothing() -> None:
    table, cache = new(max_pages=BLOCK - 1)
    cached(cache, table, text(*range(8)))
    assert cache.held_pages == 0
    assert cache.match(text(*range(8)), 8) == 0


def test_inserting_for_the_wrong_prompt_is_refused() -> None:
    table, cache = new()
    table.append("a", np.arange(3, 11, dtype=np.int32), np.arange(8, dtype=np.int32))
    with pytest.raises(AssertionError, match="another sequence's"):
        cache.insert("a", text(*range(8)), 8)
    with pytest.raises(AssertionError, match="fewer slots"):
        cache.insert("a", text(*range(8)), 9)


def visual(
    key: bytes = b"one", source: tuple[int, ...] = (0, 3), shift: int = 0, token: int = 7
) -> list[tuple[int, ...]]:
    """Rows of two text tokens around an item of two surviving tokens."""
    order = np.array([0, 1, 4, 5], np.int32)
    keys = np.zeros((4, KEY_BYTES), np.uint8)
    keys[1:3] = np.frombuffer(sha256(key).digest()[:KEY_BYTES], np.uint8)
    held = np.array([token, *source, 8])
    rows = identity_rows(held=held, keys=keys, order=order, position=order + shift)
    return [tuple(row) for row in rows.tolist()]


def test_a_row_says_what_its_slot_holds() -> None:
    same = visual()
    assert visual() == same
    assert [a == b for a, b in zip(visual(b"two"), same, strict=True)] == [True, False, False, True]
    assert [a == b for a, b in zip(visual(source=(0, 2)), same, strict=True)] == [True, True, False, True]
    assert [a == b for a, b in zip(visual(token=6), same, strict=True)] == [False, True, True, True]
    assert not any(a == b for a, b in zip(visual(shift=1), same, strict=True))
    assert len(set(same)) == 4


@pytest.mark.parametrize("axes", [1, 3])
def test_orders_and_positions_come_back(axes: int) -> None:
    order = np.array([5, 2**31 - 1], np.int32)
    position = np.array([[1, 0, 2**21 - 1], [2**21 - 1, 7, 3]], np.int32)
    if axes == 1:
        position = np.array([3, 2**31 - 1], np.int32)
    rows = identity_rows(held=np.array([2**31 - 1, 0]), order=order, position=position)
    assert orders_of(rows).tolist() == order.tolist()
    assert positions_of(rows, axes).tolist() == position.tolist()


@pytest.mark.parametrize("floods", [[b"a"], [b"a/%d" % number for number in range(40)]])
def test_a_flood_evicts_only_its_own_tenant(floods: list[bytes]) -> None:
    """R18, for prefixes: neither many prompts nor many salts of one tenant push out another's."""
    table, cache = new(pages=200, max_pages=10 * BLOCK)
    kept = [text(*range(100 * n, 100 * n + 8), salt=b"b/x") for n in range(2)]
    for number, prompt in enumerate(kept):
        cached(cache, table, prompt, f"kept{number}")
    for number in range(40):
        flood = text(*range(number, number + 8), salt=floods[number % len(floods)])
        cached(cache, table, flood, f"flood{number}")
        table.check([cache.pages])
    assert [cache.match(prompt, 8) for prompt in kept] == [8, 8]
    assert cache.held_pages <= 10 * BLOCK
    # nor does room that a sequence needs come from who holds less
    cache.evict(2 * BLOCK)
    assert [cache.match(prompt, 8) for prompt in kept] == [8, 8]
    table.check([cache.pages])
    cache.evict(10 * BLOCK)
    assert cache.held_pages == 0
