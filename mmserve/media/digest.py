"""Content keys: which bytes an item has, and which cache row one of its frames is.

Knows nothing about decoding; every number that changes a frame's embedding must be passed in.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

KEY_VERSION = b"mmserve.frame.1"

Parameter = str | int | float | bool | bytes | None | tuple["Parameter", ...]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frame_key(
    source_digest: str,
    decoder: Parameter | Mapping[str, Parameter],
    preprocessing: Parameter | Mapping[str, Parameter],
    time_s: float,
    weights_revision: str,
    salt: str = "",
) -> bytes:
    """The 32-byte address of one frame's embedding.

    Every field is written with its type and length, mappings in key order, so no two different
    inputs share an encoding. Times equal to the nanosecond are equal.
    """
    fields = (
        source_digest,
        _plain(decoder),
        _plain(preprocessing),
        round(time_s * 1e9),
        weights_revision,
        salt,
    )
    state = hashlib.sha256(_encode(KEY_VERSION))
    for field in fields:
        state.update(_encode(field))
    return state.digest()


def _plain(value: Parameter | Mapping[str, Parameter]) -> Parameter:
    if isinstance(value, Mapping):
        return tuple((name, value[name]) for name in sorted(value))
    return value


def _encode(value: Parameter) -> bytes:
    if value is None:
        tag, body = b"n", b""
    elif isinstance(value, bool):
        tag, body = b"t", bytes([value])
    elif isinstance(value, int):
        tag, body = b"i", str(value).encode()
    elif isinstance(value, float):
        tag, body = b"f", struct.pack("<d", value)
    elif isinstance(value, str):
        tag, body = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        tag, body = b"b", value
    else:
        tag, body = b"l", b"".join(_encode(item) for item in value)
    return tag + struct.pack("<Q", len(body)) + body
