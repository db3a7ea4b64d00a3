"""The cache over slower tiers: what is promoted, what is dropped, and that a broken tier is only slow."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from mmserve.config import EmbeddingTiers
from mmserve.encoders.cache import EmbeddingCache, TierStats
from mmserve.encoders.tiers.base import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker, Stored, TierError
from mmserve.encoders.tiers.behind import MAX_WAITING, Write, WriteBehind
from mmserve.encoders.tiers.open import open_cache
from mmserve.encoders.tiers.record import address, decode, encode
from mmserve.encoders.tiers.storage import Storage
from tests.encoders.entries import ROW_BYTES, ROWS, FakeTier, entry, key, same

WAIT_S = 10.0


def cache_over(*tiers: FakeTier, capacity: int = 100 * ROW_BYTES, storage: Storage = "raw") -> EmbeddingCache:
    return EmbeddingCache(capacity, tiers=tiers, rows=ROWS, storage=storage)


def place(name: int) -> bytes:
    return address(key(name), ROWS, "raw")


def test_what_is_put_reaches_every_tier_and_a_new_cache_finds_it() -> None:
    near, far = FakeTier("near"), FakeTier("far")
    first = cache_over(near, far)
    first.put(key(1), entry(4, 0.5), tenant="t")
    assert first.flush(WAIT_S)
    assert near.records.keys() == far.records.keys() == {place(1)}
    assert near.tenants == far.tenants == ["t"]
    first.close()
    assert near.is_closed
    assert far.is_closed
    second = cache_over(near, far)
    assert same(second.get(key(1), tokens=4), entry(4, 0.5))
    assert second.get(key(2)) is None
    stats = second.stats()
    assert (stats.hits, stats.misses) == (1, 1)
    size = near.used_bytes()
    assert stats.tiers == (
        TierStats("near", hits=1, corrupt=0, failures=0, stored=0, dropped=0, used_bytes=size),
        TierStats("far", hits=0, corrupt=0, failures=0, stored=0, dropped=0, used_bytes=size),
    )


def test_a_hit_moves_to_the_faster_tiers() -> None:
    near, far = FakeTier("near"), FakeTier("far")
    far.records[place(1)] = encode(key(1), entry(4, 0.5), "raw")
    cache = cache_over(near, far)
    assert cache.get(key(1)) is not None
    assert cache.flush(WAIT_S)
    assert near.records == far.records
    asked = near.asked
    assert same(cache.get(key(1)), entry(4, 0.5))
    assert near.asked == asked, "memory had it"


def test_one_call_asks_each_tier_once_and_only_for_what_is_missing() -> None:
    near, far = FakeTier("near"), FakeTier("far")
    cache = cache_over(near, far)
    cache.put(key(0), entry(1))
    near.records[place(1)] = encode(key(1), entry(1), "raw")
    far.records[place(2)] = encode(key(2), entry(1), "raw")
    assert cache.get_many([key(name) for name in range(4)]).keys() == {key(0), key(1), key(2)}
    assert (near.asked, far.asked) == (1, 1)
    assert cache.stats().misses == 1


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"noise" * 100,
        encode(key(2), entry(4), "raw"),
        encode(key(1), entry(5), "raw"),
        encode(key(1), entry(4)._replace(embeddings=torch.zeros(4, 4)), "raw"),
        encode(key(1), entry(4)._replace(embeddings=torch.zeros(4, 3, dtype=torch.bfloat16)), "raw"),
        encode(key(1), entry(4), "raw")[:-1],
    ],
    ids=["empty", "noise", "other key", "other tokens", "other width", "other dtype", "cut"],
)
def test_a_record_that_is_not_right_is_a_miss_and_goes(
    record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = FakeTier("near"), FakeTier("far")
    near.records[place(1)] = record
    cache = cache_over(near, far)
    assert cache.get(key(1), tokens=4) is None
    assert cache.flush(WAIT_S)
    assert place(1) not in near.records
    assert cache.stats().tiers[0].corrupt == 1
    assert cache.stats().misses == 1
    assert "near tier" in caplog.text


def test_a_broken_record_does_not_hide_a_sound_one_behind_it() -> None:
    near, far = FakeTier("near"), FakeTier("far")
    near.records[place(1)] = b"noise"
    far.records[place(1)] = sound = encode(key(1), entry(4, 0.5), "raw")
    cache = cache_over(near, far)
    assert same(cache.get(key(1)), entry(4, 0.5))
    assert cache.flush(WAIT_S)
    assert near.records[place(1)] == sound


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_smaller_storage_never_meets_exact_records(storage: Storage) -> None:
    tier = FakeTier()
    exact, small = cache_over(tier), cache_over(tier, storage=storage)
    small.put(key(1), entry(4, 0.5))
    assert small.flush(WAIT_S)
    assert exact.get(key(1)) is None
    assert cache_over(tier, storage=storage).get(key(1)) is not None


def test_a_tier_that_fails_costs_one_attempt_per_pause_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    near, far = FakeTier("near"), FakeTier("far")
    near.error = TierError("it is gone")
    cache = cache_over(near, far)
    for name in range(5):
        cache.put(key(name), entry(1))
        assert cache.get(key(100 + name)) is None
        assert cache.get(key(name)) is not None
    assert cache.flush(WAIT_S)
    assert near.asked == 1
    assert far.asked == 5
    assert len(far.records) == 5
    stats = cache.stats().tiers
    assert (stats[0].failures, stats[0].stored, stats[0].dropped) == (1, 0, 5)
    assert (stats[1].failures, stats[1].stored, stats[1].dropped) == (0, 5, 0)
    assert caplog.text.count("it is gone") == 2, "once for reading, once for writing"


def test_a_breaker_doubles_its_pause_and_speaks_when_its_state_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    breaker = Breaker("it", clock=lambda: now)
    pause_s = FIRST_PAUSE_S
    for _ in range(8):
        assert not breaker.is_open
        breaker.note_failure(TierError("down"))
        assert breaker.is_open
        now += pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    assert not breaker.is_open
    breaker.note_success()
    breaker.note_success()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    breaker.note_failure(TierError("down"))
    now += FIRST_PAUSE_S
    assert not breaker.is_open


class SlowTier(FakeTier):
    """Stores when it is told to."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.started, self.may_go = threading.Event(), threading.Event()

    def put_many(self, records: object) -> None:
        self.started.set()
        assert self.may_go.wait(WAIT_S)
        super().put_many(records)  # type: ignore[arg-type]  # as it was given


def test_a_put_never_waits_and_what_is_too_much_is_dropped() -> None:
    tier = SlowTier()
    size = entry(1).num_bytes
    behind = WriteBehind([tier], "raw", max_waiting_bytes=4 * size)
    behind.submit(Write((tier,), place(0), key(0), entry(1)))
    assert tier.started.wait(WAIT_S)
    for name in range(1, 10):
        behind.submit(Write((tier,), place(name), key(name), entry(1)))
    assert behind.dropped == {"slow": 6}, "one is being written, three wait"
    assert not behind.flush(0.0)
    tier.may_go.set()
    assert behind.flush(WAIT_S)
    assert tier.records.keys() == {place(name) for name in range(4)}
    assert behind.stored == {"slow": 4}
    assert behind.close(WAIT_S)
    behind.submit(Write((tier,), place(5), key(5), entry(1)))
    assert behind.dropped == {"slow": 7}, "closed"


def test_removals_are_bounded_as_well() -> None:
    tier = SlowTier()
    behind = WriteBehind([tier], "raw")
    behind.submit(Write((tier,), place(0), key(0), entry(1)))
    assert tier.started.wait(WAIT_S)
    for name in range(MAX_WAITING + 5):
        behind.submit(Write((tier,), place(name), key(name)))
    assert behind.dropped == {"slow": 5}
    tier.may_go.set()
    assert behind.close(WAIT_S)


def test_closing_does_not_wait_for_a_tier_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    tier = SlowTier()
    behind = WriteBehind([tier], "raw")
    behind.submit(Write((tier,), place(0), key(0), entry(1)))
    assert tier.started.wait(WAIT_S)
    behind.submit(Write((tier,), place(1), key(1), entry(1)))
    assert not behind.close(0.01)
    assert behind.dropped == {"slow": 1}
    tier.may_go.set()


@pytest.mark.parametrize("removed_last", [True, False])
def test_the_last_write_to_an_address_wins_within_a_batch(removed_last: bool) -> None:
    tier = SlowTier()
    tier.records[place(1)] = b"old"
    behind = WriteBehind([tier], "raw")
    behind.submit(Write((tier,), place(0), key(0), entry(1)))
    assert tier.started.wait(WAIT_S)
    store = Write((tier,), place(1), key(1), entry(1, 0.5))
    remove = Write((tier,), place(1), key(1))
    for write in (store, remove) if removed_last else (remove, store):
        behind.submit(write)
    tier.may_go.set()
    assert behind.close(WAIT_S)
    assert (place(1) in tier.records) is not removed_last
    if not removed_last:
        assert same(decode(tier.records[place(1)], key(1), ROWS), entry(1, 0.5))


def test_an_unexpected_error_does_not_end_the_writes_after_it(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(FakeTier):
        def put_many(self, records: object) -> None:
            if not self.tenants:
                self.tenants.append("seen")
                raise ZeroDivisionError
            super().put_many(records)  # type: ignore[arg-type]  # as it was given

    tier = Odd()
    behind = WriteBehind([tier], "raw")
    behind.submit(Write((tier,), place(0), key(0), entry(1)))
    assert behind.flush(WAIT_S)
    behind.submit(Write((tier,), place(1), key(1), encode(key(1), entry(1), "raw"), "t"))
    assert behind.close(WAIT_S)
    assert tier.records.keys() == {place(1)}
    assert "ZeroDivisionError" in caplog.text
    tier.put_many({b"x": Stored(b"", "")})


def test_entries_made_in_inference_mode_are_written(caplog: pytest.LogCaptureFixture) -> None:
    tier = FakeTier()
    cache = cache_over(tier, storage="int8")
    with torch.inference_mode():
        cache.put(key(1), entry(4, 0.5))
    assert cache.flush(WAIT_S)
    assert len(tier.records) == 1
    assert caplog.text == ""


def test_host_memory_backs_a_smaller_one() -> None:
    tier = FakeTier()
    cache = EmbeddingCache(2 * ROW_BYTES, tiers=[tier], rows=ROWS, host_bytes=4096)
    for name in range(10):
        cache.put(key(name), entry(2, name / 8))
    found = cache.get_many([key(name) for name in range(10)], tokens=2)
    assert all(same(found[key(name)], entry(2, name / 8)) for name in range(10))
    assert tier.asked == 0
    assert cache.stats().hits == 10
    assert cache.stats().entries == 1
    assert cache.flush(WAIT_S)
    assert len(tier.records) == 10


def test_host_memory_counts_what_pinning_takes() -> None:
    """Powers of two: 32 bytes of embeddings and 8 of saliency for two tokens of width 3."""
    cache = EmbeddingCache(0, host_bytes=3 * (32 + 8))
    for name in range(5):
        cache.put(key(name), entry(2))
    assert len(cache.get_many([key(name) for name in range(5)])) == 3


def test_a_cpu_worker_has_no_host_memory_of_its_own() -> None:
    cache = open_cache(0, EmbeddingTiers(host_bytes=1 << 20), torch.zeros(3))
    cache.put(key(1), entry(2))
    assert cache.get(key(1)) is None


def test_the_tiers_of_a_deployment_are_those_it_names(tmp_path: Path) -> None:
    settings = EmbeddingTiers(disk_path=str(tmp_path), redis_url="redis://127.0.0.1:1", storage="int8")
    cache = open_cache(1 << 20, settings, torch.zeros(3, dtype=torch.bfloat16))
    sent = entry(2, 0.5)._replace(embeddings=torch.full((2, 3), 0.5, dtype=torch.bfloat16))
    cache.put(key(1), sent)
    assert same(cache.get(key(1)), sent)
    assert [tier.name for tier in cache.stats().tiers] == ["disk", "redis"]
    cache.close()
    again = open_cache(1 << 20, EmbeddingTiers(disk_path=str(tmp_path), storage="int8"), sent.embeddings[0])
    assert same(again.get(key(1), tokens=2), sent), "0.5 in every channel is exact in int8"
    again.close()
