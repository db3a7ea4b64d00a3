"""Content keys never collide by construction (R17)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mmserve.media.digest import Parameter, file_digest, frame_key

BASE: dict[str, Parameter] = {"name": "x", "threads": 1}


def key(
    source: str = "aa",
    decoder: Parameter | dict[str, Parameter] = "d",
    preprocessing: Parameter | dict[str, Parameter] = "p",
    time_s: float = 0.0,
    revision: str = "r",
    salt: str = "",
) -> bytes:
    return frame_key(source, decoder, preprocessing, time_s, revision, salt)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_key_has_32_bytes_and_does_not_depend_on_the_order_of_parameters() -> None:
    assert len(key()) == 32
    assert key(decoder={"a": 1, "b": 2}) == key(decoder={"b": 2, "a": 1})


def test_every_field_and_every_border_between_fields_counts() -> None:
    keys = [
        key(),
        key(source="ab"),
        key(source="aad"),
        key(source="aad", decoder=""),
        key(decoder="dp", preprocessing=""),
        key(decoder="", preprocessing="dp"),
        key(decoder={"size": (30, 150)}),
        key(decoder={"size": (150, 30)}),
        key(decoder={"size": ((150,), 30)}),
        key(decoder={"size": "150"}),
        key(decoder={"size": 150}),
        key(decoder={"size": 150.0}),
        key(decoder={"size": True}),
        key(decoder={"size": 1}),
        key(decoder={"size": None}),
        key(decoder={"size": b"150"}),
        key(decoder={"size": ()}),
        key(decoder={}),
        key(time_s=0.04),
        key(time_s=0.040000001),
        key(revision="r2"),
        key(revision="", salt="r"),
        key(salt="tenant"),
    ]
    assert len(set(keys)) == len(keys)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(first=_values, second=_values)
def test_different_parameters_have_different_keys(first: Parameter, second: Parameter) -> None:
    assert (key(decoder=first) == key(decoder=second)) == (repr(first) == repr(second))
