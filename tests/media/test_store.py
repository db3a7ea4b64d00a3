"""Files by content: there while held or kept, and all that is held within one budget (R30)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mmserve.errors import MediaNotFound, Overloaded, TooLarge
from mmserve.media.remembered import LEAST_BYTES, RememberedMedia
from mmserve.media.store import ContentStore, StoredFile
from mmserve.request import MediaRef, Modality


def put(store: ContentStore, content: bytes, expected: int = 0) -> StoredFile:
    with store.incoming(1 << 20, expected) as file:
        file.write(content)
        return file.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_held_has_a_budget(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, max_bytes=10)
    first = put(store, b"123456")
    assert store.held_bytes == 6
    with pytest.raises(Overloaded, match="5 bytes of media, but the server holds 6 of 10"):
        put(store, b"12345", expected=5)
    with store.incoming(100) as file:
        file.write(b"1234")
        with pytest.raises(Overloaded):
            file.write(b"5")
    assert store.held_bytes == 6
    assert names(tmp_path) == [first.digest]
    put(store, b"1234")
    assert store.held_bytes == 10
    store.release(first.path)
    assert store.held_bytes == 4


def test_the_same_content_counts_once(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, max_bytes=10)
    first, second = put(store, b"12345"), put(store, b"12345")
    assert first == second
    assert store.held_bytes == 5
    store.release(first.path)
    assert store.held_bytes == 5
    store.release(first.path)
    assert (store.held_bytes, names(tmp_path)) == (0, [])


def test_who_announces_more_than_comes_pays_for_what_came(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, max_bytes=10)
    put(store, b"12", expected=9)
    assert store.held_bytes == 2
    with pytest.raises(TooLarge), store.incoming(3, expected=1) as file:
        file.write(b"1234")
    assert store.held_bytes == 2


def test_kept_files_are_outside_the_budget_until_held_again(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, max_bytes=10)
    kept = put(store, b"12345678")
    assert store.keep(kept.path) == 8
    store.release(kept.path)
    assert (store.held_bytes, names(tmp_path)) == (0, [kept.digest])
    other = put(store, b"abcd")
    with pytest.raises(Overloaded):
        store.hold(kept.path)
    store.release(other.path)
    assert store.hold(kept.path)
    store.drop(kept.path)
    assert names(tmp_path) == [kept.digest]
    store.release(kept.path)
    assert (store.held_bytes, names(tmp_path)) == (0, [])
    assert not store.hold(kept.path)
    assert store.keep(tmp_path / "other") is None
    store.drop(tmp_path / "other")
    store.release(tmp_path / "other")


def test_many_threads_leave_nothing(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, max_bytes=40)
    refused = 0

    def work(number: int) -> None:
        nonlocal refused
        for turn in range(50):
            try:
                stored = put(store, b"x" * (1 + (number + turn) % 9))
            except Overloaded:
                refused += 1
                continue
            if turn % 3 == 0:
                store.keep(stored.path)
                store.drop(stored.path)
            store.release(stored.path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (store.held_bytes, names(tmp_path)) == (0, [])


# remembered by name


def remembered(store: ContentStore, max_bytes: int) -> RememberedMedia:
    return RememberedMedia(store, max_bytes)


def send(
    memory: RememberedMedia,
    store: ContentStore,
    uuid: str,
    content: bytes,
    tenant: str = "a",
    modality: Modality = "image",
) -> MediaRef:
    """As a request that ends at once."""
    stored = put(store, content)
    ref = MediaRef(modality=modality, path=str(stored.path), digest=stored.digest, source="data:")
    memory.remember(tenant, uuid, ref)
    store.release(stored.path)
    return ref


def test_a_name_finds_what_was_sent_under_it(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, 10 * LEAST_BYTES)
    first = send(memory, store, "one", b"first")
    assert memory.find("a", "one", "image") == first
    assert store.held_bytes == 5
    store.release(first.path)
    second = send(memory, store, "one", b"second")
    assert memory.find("a", "one", "image") == second
    store.release(second.path)
    assert names(tmp_path) == [second.digest]


@pytest.mark.parametrize(
    ("tenant", "uuid", "modality"), [("b", "one", "image"), ("a", "two", "image"), ("a", "one", "video")]
)
def test_a_name_means_nothing_to_others(tmp_path: Path, tenant: str, uuid: str, modality: Modality) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, 10 * LEAST_BYTES)
    send(memory, store, "one", b"first")
    with pytest.raises(MediaNotFound, match=f"uuid '{uuid}'") as caught:
        memory.find(tenant, uuid, modality)
    assert (caught.value.status, caught.value.code) == (409, "media_not_found")


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, 3 * LEAST_BYTES)
    refs = [send(memory, store, str(number), b"%d" % number) for number in range(3)]
    store.release(memory.find("a", "0", "image").path)
    refs.append(send(memory, store, "3", b"3"))
    with pytest.raises(MediaNotFound):
        memory.find("a", "1", "image")
    assert names(tmp_path) == sorted(ref.digest for number, ref in enumerate(refs) if number != 1)
    assert memory.total_bytes == 3 * LEAST_BYTES


@pytest.mark.parametrize("salts", [1, 50])
def test_a_flood_pushes_out_its_senders_media_only(tmp_path: Path, salts: int) -> None:
    """R18, for media by name; many salts of one tenant have the share of one."""
    store = ContentStore(tmp_path)
    memory = remembered(store, 8 * LEAST_BYTES)
    kept = [send(memory, store, str(number), b"b%d" % number, "b/x") for number in range(3)]
    for number in range(50):
        send(memory, store, str(number), b"a%d" % number, f"a/{number % salts}")
    for number, ref in enumerate(kept):
        assert memory.find("b/x", str(number), "image") == ref
        store.release(ref.path)
    assert memory.find(f"a/{49 % salts}", "49", "image")
    assert memory.total_bytes == 8 * LEAST_BYTES


def test_what_is_too_large_is_not_remembered(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, 2 * LEAST_BYTES)
    send(memory, store, "small", b"1", "b")
    send(memory, store, "large", bytes(3 * LEAST_BYTES))
    with pytest.raises(MediaNotFound):
        memory.find("a", "large", "image")
    store.release(memory.find("b", "small", "image").path)
    assert memory.total_bytes == LEAST_BYTES


def test_a_forgotten_file_stays_while_a_request_has_it(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, LEAST_BYTES)
    first = send(memory, store, "one", b"first")
    memory.find("a", "one", "image")
    send(memory, store, "two", b"second")
    assert Path(first.path).read_bytes() == b"first"
    store.release(first.path)
    assert not Path(first.path).exists()


def test_a_users_own_file_is_looked_at_again(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    memory = remembered(store, LEAST_BYTES)
    file = tmp_path / "a.png"
    file.write_bytes(b"first")
    ref = MediaRef(modality="image", path=str(file), digest="0" * 64, source="a.png")
    memory.remember("", "one", ref)
    file.write_bytes(b"second")
    assert memory.find("", "one", "image").digest != ref.digest
    file.unlink()
    with pytest.raises(MediaNotFound):
        memory.find("", "one", "image")
