"""transfer.py: what is published is read back, and nothing else can be read (R3, R33, R34)."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mmserve import transfer
from mmserve.errors import Overloaded, Unavailable, WireError
from mmserve.lease import Lease
from mmserve.transfer import LeaseGone, LeaseStore, open_lease, remove_leases_of, unlink_lease
from mmserve.wire import Array, TypedArray


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "shm").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "shm", tmp_path / "run"


@pytest.fixture
def store(roots: tuple[Path, Path], clock: FakeClock) -> Iterator[LeaseStore]:
    with LeaseStore(roots, clock=clock) as store:
        yield store


ARRAYS: dict[str, Array] = {
    "embeddings": np.arange(12, dtype=np.float32).reshape(3, 4),
    "source": np.array([0, 5, 7], np.int32),
    "none": np.zeros((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
    "strided": np.arange(20, dtype=np.int16).reshape(4, 5)[:, ::2],
}


def files(roots: tuple[Path, ...]) -> list[Path]:
    return [path for root in roots for path in root.rglob("*") if path.is_file()]


def test_arrays_come_back_equal_and_read_only(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish(ARRAYS, ttl_s=30, owner="r1", with_crc=True)
    wired = msgspec.msgpack.decode(msgspec.msgpack.encode(lease), type=Lease)
    opened = open_lease(wired, roots, verify=True)
    assert list(opened) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened[name], array)
        assert opened[name].dtype == array.dtype
        assert not opened[name].flags.writeable


def test_logical_dtype_travels_in_the_header(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    bits = np.array([0x3F80, 0x4000], np.uint16)
    lease = store.publish({"k": TypedArray(bits, "bfloat16")}, ttl_s=30)
    assert lease.arrays[0].dtype == "bfloat16"
    np.testing.assert_array_equal(open_lease(lease, roots)["k"], bits)


def test_lease_without_arrays_is_fine(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    assert open_lease(store.publish({}, ttl_s=30), roots) == {}


def test_mapped_arrays_outlive_the_file(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish(ARRAYS, ttl_s=30)
    opened = open_lease(lease, roots)
    assert store.release(lease.lease_id)
    assert not store.release(lease.lease_id)
    np.testing.assert_array_equal(opened["embeddings"], ARRAYS["embeddings"])
    with pytest.raises(LeaseGone):
        open_lease(lease, roots)


def test_bytes_are_accounted_and_end_at_zero(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    leases = [store.publish(ARRAYS, ttl_s=30, owner=owner) for owner in ("a", "b", "a")]
    assert store.bytes_held == sum(lease.total_bytes for lease in leases)
    assert len(files(roots)) == store.num_held == 3
    assert set(store.release_owner("a")) == {leases[0].lease_id, leases[2].lease_id}
    assert store.bytes_held == leases[1].total_bytes
    store.release(leases[1].lease_id)
    assert store.bytes_held == 0
    assert files(roots) == []


def test_sweep_releases_what_expired(store: LeaseStore, roots: tuple[Path, Path], clock: FakeClock) -> None:
    short, long, renewed = (store.publish(ARRAYS, ttl_s=ttl_s) for ttl_s in (10, 30, 10))
    clock.now += 5
    assert store.renew(renewed.lease_id, 30)
    assert not store.renew("0" * 32, 30)
    clock.now += 4.9
    assert store.sweep() == []
    clock.now += 0.1
    assert store.sweep() == [short.lease_id]
    open_lease(long, roots)
    assert set(store.sweep(now=1e9)) == {long.lease_id, renewed.lease_id}
    assert files(roots) == []


def test_close_removes_everything_and_ends_publishing(roots: tuple[Path, Path]) -> None:
    store = LeaseStore(roots)
    store.publish(ARRAYS, ttl_s=30)
    store.close()
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []
    with pytest.raises(Unavailable):
        store.publish(ARRAYS, ttl_s=30)
    assert store.bytes_held == 0


def test_files_and_directories_are_private(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    path = Path(store.publish(ARRAYS, ttl_s=30).path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent == roots[0]


def test_full_shared_memory_falls_back_to_the_run_directory(
    store: LeaseStore, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_has_room", lambda *_: False)
    lease = store.publish(ARRAYS, ttl_s=30)
    assert Path(lease.path).is_relative_to(roots[1])
    assert open_lease(lease, roots)["scalar"] == 7


def test_disk_that_fills_up_is_overload_and_leaves_nothing(
    store: LeaseStore, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Overloaded):
        store.publish(ARRAYS, ttl_s=30)
    assert files(roots) == []
    assert store.bytes_held == 0


def changed(lease: Lease, **values: object) -> Lease:
    """The lease with other values and, as a clever liar would, the checksum they call for."""
    lease = msgspec.structs.replace(lease, **values)
    checksum = transfer._checksum(lease.lease_id, lease.total_bytes, lease.arrays)
    return msgspec.structs.replace(lease, checksum=checksum)


def test_lease_that_differs_from_its_file_is_refused(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish(ARRAYS, ttl_s=30)
    first = lease.arrays[0]
    other_type = msgspec.structs.replace(first, dtype="int32")
    liars = [
        msgspec.structs.replace(lease, checksum=lease.checksum ^ 1),
        msgspec.structs.replace(lease, total_bytes=lease.total_bytes + 1),
        changed(lease, total_bytes=lease.total_bytes + 64),
        changed(lease, total_bytes=-1),
        changed(lease, arrays=(other_type, *lease.arrays[1:])),
        changed(lease, arrays=lease.arrays[:-1]),
        changed(lease, lease_id="f" * 32),
        changed(lease, lease_id="../" + "f" * 29),
    ]
    for liar in liars:
        with pytest.raises(WireError):
            open_lease(liar, roots)
    with pytest.raises(WireError):
        open_lease(lease, roots, max_bytes=100)
    with pytest.raises(WireError):
        open_lease(lease, roots, verify=True)


def test_path_outside_the_run_directory_is_refused(
    store: LeaseStore, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    lease = store.publish(ARRAYS, ttl_s=30)
    name = Path(lease.path).name
    inside, outside = Path(lease.path).parent, tmp_path / "outside"
    outside.mkdir()
    (outside / name).write_bytes(Path(lease.path).read_bytes())
    (roots[0] / "link").symlink_to(outside)
    paths = [
        f"{outside}/{name}",
        f"{inside}/../../outside/{name}",
        f"{roots[0]}/link/{name}",
        f"{inside}/{name}\0",
        f"{inside}/\0/{name}",
        name,
        "/etc/passwd",
        "",
    ]
    for path in paths:
        wrong = msgspec.structs.replace(lease, path=path)
        with pytest.raises(WireError):
            open_lease(wrong, roots)
        with pytest.raises(WireError):
            unlink_lease(wrong, roots)
    assert Path(lease.path).exists()


def test_links_pipes_and_wrong_sizes_are_refused(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish(ARRAYS, ttl_s=30)
    path = Path(lease.path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(WireError):
        open_lease(lease, roots)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WireError):
        open_lease(lease, roots)
    path.unlink()
    elsewhere = path.with_name("elsewhere")
    elsewhere.write_bytes(whole)
    path.symlink_to(elsewhere)
    with pytest.raises(WireError):
        open_lease(lease, roots)
    path.unlink()
    path.mkdir()
    with pytest.raises(WireError):
        open_lease(lease, roots)
    path.rmdir()


def test_damaged_bytes_never_pass_verification(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish({"a": np.arange(64, dtype=np.uint8)}, ttl_s=30, with_crc=True)
    path = Path(lease.path)
    whole = path.read_bytes()
    chance = random.Random(3)
    preamble = transfer._PREAMBLE.size
    for _ in range(300):
        data = bytearray(whole)
        # bytes between the preamble and the first array mean nothing
        where = chance.choice([*range(preamble), *range(64, len(data))])
        data[where] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(WireError):
            open_lease(lease, roots, verify=True)
    path.write_bytes(whole)
    open_lease(lease, roots, verify=True)


def test_files_of_a_dead_owner_can_be_removed(store: LeaseStore, roots: tuple[Path, Path]) -> None:
    lease = store.publish(ARRAYS, ttl_s=30)
    assert unlink_lease(lease, roots)
    assert not unlink_lease(lease, roots)
    store.publish(ARRAYS, ttl_s=30)
    remove_leases_of(os.getpid() + 1, roots)
    assert len(files(roots)) == 1
    remove_leases_of(os.getpid(), roots)
    assert files(roots) == []
