"""The disk tier: what a restart finds, what is evicted, and what damage to the file does."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
import torch

from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers.base import Stored, TierError
from mmserve.encoders.tiers.disk import DiskTier
from mmserve.encoders.tiers.ledger import disk_bytes
from mmserve.encoders.tiers.record import Entry, RowFormat
from mmserve.errors import ConfigError
from tests.encoders.entries import ROWS, entry, key, same

BUDGET = 1 << 20
SIZE = 20_000
WAIT_S = 10.0


class Clock:
    """Each look is one nanosecond later."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def tier_in(directory: Path, max_bytes: int = BUDGET, clock: Clock | None = None) -> DiskTier:
    return DiskTier(directory, max_bytes, clock_ns=clock or Clock())


def name(number: int) -> bytes:
    return key(number) + b"address"


def put(tier: DiskTier, *numbers: int, tenant: str = "", size: int = SIZE) -> None:
    for number in numbers:
        tier.put_many({name(number): Stored(random.Random(number).randbytes(size), tenant)})


def held(tier: DiskTier, numbers: range) -> set[int]:
    return {number for number in numbers if name(number) in tier.get_many([name(number)])}


def data(directory: Path) -> Path:
    return directory / "data.mdb"


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests commit often, and a disk takes its time."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    with closing(tier_in(tmp_path)) as tier:
        put(tier, *range(20))
    return tmp_path


def test_a_restart_finds_everything(filled: Path) -> None:
    with closing(tier_in(filled)) as tier:
        found = tier.get_many([name(number) for number in range(25)])
        assert found == {name(number): random.Random(number).randbytes(SIZE) for number in range(20)}
        assert tier.used_bytes() == 20 * disk_bytes(bytes(SIZE))


def test_a_restarted_cache_needs_no_encoder(tmp_path: Path) -> None:
    sent = [Entry(torch.randn(36, 64), torch.rand(36)) for _ in range(32)]
    rows = RowFormat(64, torch.float32)
    first = EmbeddingCache(1 << 20, tiers=[tier_in(tmp_path, 16 << 20)], rows=rows)
    for number, one in enumerate(sent):
        first.put(key(number), one)
    first.close()
    second = EmbeddingCache(1 << 20, tiers=[tier_in(tmp_path, 16 << 20)], rows=rows)
    found = second.get_many([key(number) for number in range(32)], tokens=36)
    assert all(same(found.get(key(number)), one) for number, one in enumerate(sent))
    assert second.stats().tiers[0].hits == 32
    second.close()


def test_what_was_used_last_stays_also_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    count = BUDGET // disk_bytes(bytes(SIZE))
    with closing(tier_in(tmp_path, clock=clock)) as tier:
        put(tier, *range(count))
        assert tier.get_many([name(0), name(1)])
    with closing(tier_in(tmp_path, clock=clock)) as tier:
        put(tier, *range(100, 103))
        assert held(tier, range(count)) >= {0, 1}
        assert 2 not in held(tier, range(count))
        assert held(tier, range(100, 103)) == {100, 101, 102}


def test_the_file_stays_within_a_tenth_over_its_budget(tmp_path: Path) -> None:
    chance = random.Random(7)
    with closing(tier_in(tmp_path)) as tier:
        for number in range(200):
            size = chance.choice([300, 5_000, 20_000, 90_000])
            put(tier, number, size=size)
            assert name(number) in tier.get_many([name(number)]), "the newest is always there"
            assert (tier.used_bytes() or 0) <= BUDGET
        put(tier, 1000, size=BUDGET + 1)
        assert name(1000) not in tier.get_many([name(1000)])
        assert (tier.used_bytes() or 0) > BUDGET // 2, "one that cannot fit evicts nothing"
    assert data(tmp_path).stat().st_size <= BUDGET * 11 // 10


def test_records_that_fill_the_budget_take_turns(tmp_path: Path) -> None:
    with closing(tier_in(tmp_path)) as tier:
        for number in range(6):
            put(tier, number, size=BUDGET * 7 // 10)
            assert held(tier, range(6)) == {number}


def test_a_flood_evicts_only_its_own_tenant(tmp_path: Path) -> None:
    """R18."""
    with closing(tier_in(tmp_path)) as tier:
        put(tier, *range(10), tenant="quiet")
        put(tier, *range(100, 200), tenant="loud")
        assert held(tier, range(10)) == set(range(10))
        assert 199 in held(tier, range(100, 200))


def test_a_record_that_is_replaced_counts_once(tmp_path: Path) -> None:
    with closing(tier_in(tmp_path)) as tier:
        for tenant in ("a", "b", "a"):
            put(tier, 1, tenant=tenant)
        assert tier.used_bytes() == disk_bytes(bytes(SIZE))
        tier.discard([name(1), name(2)])
        assert (tier.used_bytes(), held(tier, range(3))) == (0, set())


def test_a_smaller_budget_starts_anew(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(tier_in(filled, BUDGET // 4)) as tier:
        assert held(tier, range(20)) == set()
        put(tier, 1)
    assert data(filled).stat().st_size <= BUDGET // 4 * 11 // 10
    assert "starts anew" in caplog.text


def test_a_larger_budget_keeps_what_is_there(filled: Path) -> None:
    with closing(tier_in(filled, 4 * BUDGET)) as tier:
        assert held(tier, range(20)) == set(range(20))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["bits", "page", "cut"])
def test_a_damaged_file_gives_misses_and_never_an_end(
    kind: str, seed: int, filled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each restart either keeps the file or starts anew; records prove themselves elsewhere."""
    chance = random.Random(seed)
    content = bytearray(data(filled).read_bytes())
    for _ in range(50 if kind == "bits" else 1):
        at = chance.randrange(len(content))
        if kind == "bits":
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "page":
            content[at // 4096 * 4096 :][:4096] = chance.randbytes(4096)
        else:
            del content[at:]
    data(filled).write_bytes(content)
    caplog.set_level(logging.CRITICAL)
    with closing(tier_in(filled)) as tier:
        held(tier, range(20))
        put(tier, *range(30, 90))
        assert 89 in held(tier, range(30, 90))


def test_tables_that_contradict_each_other_are_noticed(filled: Path) -> None:
    env = lmdb.open(str(filled), max_dbs=4)
    with env.begin(write=True, db=env.open_db(b"notes")) as txn:
        txn.delete(name(3))
    env.close()
    with closing(tier_in(filled)) as tier:
        assert held(tier, range(20)) == set()


def test_tables_that_break_while_open_are_errors_of_the_tier(tmp_path: Path) -> None:
    with closing(tier_in(tmp_path)) as tier:
        put(tier, *range(20))
        with tier._env.begin(write=True, db=tier._tables.ages) as txn:
            txn.drop(tier._tables.ages, delete=False)
        with pytest.raises(TierError):
            put(tier, 1)
        with pytest.raises(TierError):
            tier.discard([name(1)])


def test_a_directory_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="directory"):
        tier_in(tmp_path / "file")
    (tmp_path / "data.mdb").mkdir()
    with pytest.raises(ConfigError):
        tier_in(tmp_path)


def test_files_are_private(filled: Path) -> None:
    for path in filled.iterdir():
        assert path.stat().st_mode & 0o077 == 0


OTHER = """
import sys
from pathlib import Path
from mmserve.encoders.tiers.base import Stored
from mmserve.encoders.tiers.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), int(sys.argv[2]))
for line in sys.stdin:
    number = int(line)
    name = number.to_bytes(4, "big") * 8 + b"address"
    found = tier.get_many([name]).get(name)
    tier.put_many({name: Stored(b"other" * 4000, "")})
    sys.stdout.write(f"{found is not None}\\n")
    sys.stdout.flush()
tier.close()
"""


def test_two_processes_share_the_file_and_its_budget(tmp_path: Path) -> None:
    with closing(tier_in(tmp_path)) as tier:
        put(tier, 0)
        command = [sys.executable, "-c", OTHER, str(tmp_path), str(BUDGET)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            for number in range(40):
                put(tier, number)
                other.stdin.write(f"{number}\n")
                other.stdin.flush()
                assert other.stdout.readline() == "True\n"
                assert tier.get_many([name(number)]) == {name(number): b"other" * 4000}
            other.stdin.close()
            assert other.wait(WAIT_S) == 0
        put(tier, 1000)
        assert (tier.used_bytes() or 0) <= BUDGET
    assert data(tmp_path).stat().st_size <= BUDGET * 11 // 10


def test_a_killed_process_leaves_a_file_that_opens(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OTHER, str(tmp_path), str(BUDGET)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for number in range(5):
            other.stdin.write(f"{number}\n")
        other.stdin.flush()
        assert [other.stdout.readline() for _ in range(5)] == ["False\n"] * 5
        other.kill()
    with closing(tier_in(tmp_path)) as tier:
        assert held(tier, range(5)) == set(range(5))


def test_the_cache_removes_a_record_whose_bytes_rotted(tmp_path: Path) -> None:
    cache = EmbeddingCache(0, tiers=[tier_in(tmp_path)], rows=ROWS)
    cache.put(key(1), entry(2000, 0.5))
    cache.close()
    content = data(tmp_path).read_bytes()
    at = content.index(b"MMSE") + 10_000
    data(tmp_path).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    cache = EmbeddingCache(0, tiers=[tier_in(tmp_path)], rows=ROWS)
    assert cache.get(key(1)) is None
    assert cache.flush(WAIT_S)
    stats = cache.stats().tiers[0]
    assert (stats.corrupt, stats.used_bytes) == (1, 0)
    cache.close()
