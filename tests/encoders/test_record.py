"""Records: what goes in comes out, and nothing that was changed, cut or belongs to another does."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.encoders.tiers.record import Entry, RowFormat, address, decode, encode
from mmserve.encoders.tiers.storage import Storage, restore, shrink
from mmserve.errors import WireError
from tests.encoders.entries import ROWS, entry, key, same

STORAGES: tuple[Storage, ...] = ("raw", "int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_raw_record_gives_the_same_bits_back(tokens: int, dtype: torch.dtype) -> None:
    sent = Entry(torch.randn(tokens, 5).to(dtype), torch.rand(tokens))
    record = encode(key(1), sent, "raw")
    found = decode(record, key(1), RowFormat(5, dtype), tokens)
    assert same(found, sent)
    found.embeddings.zero_()
    assert same(decode(record, key(1), RowFormat(5, dtype)), sent), "a record's memory is not the entry's"


@pytest.mark.parametrize("storage", STORAGES)
def test_one_changed_byte_anywhere_is_noticed(storage: Storage) -> None:
    record = encode(key(1), entry(4, 0.5), storage)
    for position in range(len(record)):
        broken = bytearray(record)
        broken[position] ^= 1 << position % 8
        with pytest.raises(WireError):
            decode(broken, key(1), ROWS)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_record_cut_or_with_more_at_its_end_is_noticed(storage: Storage) -> None:
    record = encode(key(1), entry(4, 0.5), storage)
    for end in range(len(record)):
        with pytest.raises(WireError):
            decode(record[:end], key(1), ROWS)
    with pytest.raises(WireError):
        decode(record + b"\0", key(1), ROWS)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_is_no_record(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode(noise, key(1), ROWS)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("name", "rows", "tokens"),
    [
        (2, ROWS, 4),
        (1, RowFormat(4, torch.float32), 4),
        (1, RowFormat(3, torch.bfloat16), 4),
        (1, RowFormat(3, torch.float16), 4),
        (1, ROWS, 5),
        (1, ROWS, 0),
    ],
)
def test_a_sound_record_of_something_else_is_a_mismatch(
    storage: Storage, name: int, rows: RowFormat, tokens: int
) -> None:
    record = encode(key(1), entry(4), storage)
    decode(record, key(1), ROWS, 4)
    with pytest.raises(WireError):
        decode(record, key(name), rows, tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "int8"},
        {"storage": "none"},
        {"arrays": []},
        {"arrays": [["embeddings", "float32", [2, 6], 0], ["saliency", "float32", [4], 64]]},
        {"arrays": [["embeddings", "float32", [12], 0], ["saliency", "float32", [4], 64]]},
        {"arrays": [["embeddings", "int32", [4, 3], 0], ["saliency", "float32", [4], 64]]},
        {"arrays": [["embeddings", "float32", [4, 3], 0], ["saliency", "int32", [4], 64]]},
        {"arrays": [["embeddings", "float32", [4, 3], 0], ["saliency", "float32", [2, 2], 64]]},
        {"arrays": [["embeddings", "float32", [1 << 40, 3], 0], ["saliency", "float32", [4], 64]]},
        {"arrays": [["embeddings", "float32", [4, 3], 0], ["embeddings", "float32", [4], 64]]},
        {"more": 1},
    ],
)
def test_a_head_that_lies_is_noticed_even_with_a_right_digest(change: dict[str, object]) -> None:
    """As another version of the program, or somebody with access to the server, could write it."""
    record = encode(key(1), entry(4), "raw")
    head_bytes = int.from_bytes(record[6:8], "little")
    head = msgspec.msgpack.decode(record[24 : 24 + head_bytes])
    names = ("name", "dtype", "shape", "offset")
    if isinstance(arrays := change.get("arrays"), list):
        change = {"arrays": [dict(zip(names, array, strict=True)) for array in arrays]}
    new_head = msgspec.msgpack.encode(head | change)
    prefix = record[:6] + len(new_head).to_bytes(2, "little")
    rest = new_head + record[24 + head_bytes :]
    digest = hashlib.blake2b(prefix + rest, digest_size=16).digest()
    unchanged = hashlib.blake2b(record[:8] + record[24:], digest_size=16).digest()
    assert record[8:24] == unchanged, "the digest of this test is not the record's"
    with pytest.raises(WireError):
        decode(prefix + digest + rest, key(1), ROWS)


def test_other_numbers_lie_at_another_address() -> None:
    places = {address(key(1), RowFormat(3, dtype), "raw") for dtype in (torch.float32, torch.bfloat16)}
    places |= {address(key(name), ROWS, storage) for name in (1, 2) for storage in STORAGES}
    assert len(places) == 7


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows of very different sizes, with outliers and zeros."""
    wide = st.floats(-(2.0**119), 2.0**119, width=32)
    plain = st.floats(-4, 4, width=32)
    width = draw(st.integers(1, 12))
    row = st.lists(st.one_of(plain, wide), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@given(rows=rows())
@settings(max_examples=80, deadline=None)
def test_shrunk_numbers_stay_within_the_documented_bound(storage: Storage, rows: torch.Tensor) -> None:
    exact = rows.double()
    largest = exact.abs().amax(-1, keepdim=True)
    if storage == "int8":
        bound = (largest / 254).expand_as(exact)
    else:
        bound = torch.maximum(exact.abs() / 16, largest / 458752)
    bound = torch.where(largest < 2.0**-100, largest, bound * 1.001)
    found = restore(*shrink(rows, storage), torch.float32).double()
    assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shrunk_record_is_smaller_and_its_saliency_exact(storage: Storage, dtype: torch.dtype) -> None:
    sent = Entry(torch.randn(50, 64).to(dtype), torch.rand(50))
    record = encode(key(1), sent, storage)
    assert len(record) < len(encode(key(1), sent, "raw")) * 0.7
    found = decode(record, key(1), RowFormat(64, dtype), 50)
    assert torch.equal(found.saliency, sent.saliency)
    assert found.embeddings.dtype == dtype
    error = (found.embeddings.float() - sent.embeddings.float()).norm() / sent.embeddings.float().norm()
    assert float(error) < {"int8": 0.01, "fp8": 0.04}[storage]


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_numbers_that_no_scale_can_hold_are_stored_as_they_are(storage: Storage, value: float) -> None:
    sent = entry(3, 1.0)
    sent.embeddings[1, 1] = value
    found = decode(encode(key(1), sent, storage), key(1), ROWS)
    assert torch.equal(found.embeddings.view(torch.int32), sent.embeddings.view(torch.int32))
