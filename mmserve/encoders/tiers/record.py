"""One cache entry as bytes that prove themselves: what the slower tiers store.

A record is a prefix (magic, version, length of its head), a digest, a head that says whose entry it is and
how its arrays lie, and the arrays. The digest covers everything else, so one changed, missing or added byte
is a WireError, which callers treat as a miss. Knows nothing about where records are kept.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from mmserve.encoders.tiers.storage import DTYPES, Storage, restore, shrink, storage_for
from mmserve.errors import WireError
from mmserve.lease import ArrayHeader
from mmserve.tensors import to_numpy, to_torch
from mmserve.wire import Array, Buffer, Codec, array_from, check_layout, checked_bytes, lay_out

VERSION: Final = 1
_MAGIC: Final = b"MMSE"
_PREFIX: Final = struct.Struct("<4sHH")  # magic, version, bytes of the head
_DIGEST_BYTES: Final = 16
_HEAD_START: Final = _PREFIX.size + _DIGEST_BYTES
_SHRUNK: Final = ("embeddings", "scale", "saliency")
_NAMES: Final = {"raw": ("embeddings", "saliency"), "int8": _SHRUNK, "fp8": _SHRUNK}


class Entry(NamedTuple):
    """What the encoder gave for one frame."""

    embeddings: Tensor  # [N, D]
    saliency: Tensor  # fp32 [N]

    @property
    def num_bytes(self) -> int:
        return self.embeddings.nbytes + self.saliency.nbytes


class RowFormat(NamedTuple):
    """What the embeddings of one encoder have in common."""

    width: int  # D
    dtype: torch.dtype


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: bytes
    storage: Storage
    dtype: str  # of the embeddings, whatever they are stored as
    arrays: tuple[ArrayHeader, ...]  # offsets count from the end of the head


_HEADS: Final[Codec[_Head]] = Codec(_Head, max_bytes=1 << 12)


def address(key: bytes, rows: RowFormat, storage: Storage) -> bytes:
    """Where a tier keeps the record: deployments that store other numbers under one key do not meet."""
    return key + f"{VERSION}:{_name(rows.dtype)}:{storage}".encode()


def encode(key: bytes, entry: Entry, storage: Storage) -> bytes:
    """The entry's record; its tensors may lie on any device."""
    storage = storage_for(entry.embeddings, storage)
    numbers = [entry.embeddings] if storage == "raw" else [*shrink(entry.embeddings, storage)]
    tensors = [*numbers, entry.saliency.float()]
    arrays = {name: to_numpy(tensor) for name, tensor in zip(_NAMES[storage], tensors, strict=True)}
    layout = lay_out(arrays, 0)
    head = _HEADS.encode(_Head(key, storage, _name(entry.embeddings.dtype), layout.headers))
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(head))
    parts: list[Buffer] = [head]
    end = 0
    for header, value in zip(layout.headers, arrays.values(), strict=True):
        parts.append(bytes(header.offset - end))
        parts.append(value.array.reshape(-1).view(np.uint8).data)
        end = header.offset + checked_bytes(header)
    return b"".join([prefix, _digest([prefix, *parts]), *parts])


def decode(record: Buffer, key: bytes, rows: RowFormat, tokens: int | None = None) -> Entry:
    """The entry, on the CPU and in memory of its own.

    WireError unless the record is whole, of this key and these rows and, where given, of so many tokens.
    """
    view = memoryview(record)
    if len(view) < _HEAD_START:
        raise WireError("Expected a cache record, but it is too short")
    prefix, digest, rest = view[: _PREFIX.size], view[_PREFIX.size : _HEAD_START], view[_HEAD_START:]
    magic, version, head_bytes = _PREFIX.unpack(prefix)
    if (magic, version) != (_MAGIC, VERSION) or _digest([prefix, rest]) != digest:
        raise WireError("Expected a whole cache record of this version, but it is not")
    head = _HEADS.decode(rest[:head_bytes])
    if (head.key, head.dtype) != (key, _name(rows.dtype)):
        raise WireError("Expected the record of this key and dtype, but it is another's")
    arrays = _arrays(head, rest[head_bytes:])
    saliency = arrays["saliency"]
    count = len(saliency.view(-1)) if tokens is None else tokens
    stored = rows.dtype if head.storage == "raw" else DTYPES[head.storage]
    _expect(arrays["embeddings"], (count, rows.width), stored)
    _expect(saliency, (count,), torch.float32)
    if head.storage == "raw":
        return Entry(arrays["embeddings"], saliency)
    _expect(arrays["scale"], (count,), torch.float32)
    return Entry(restore(arrays["embeddings"], arrays["scale"], rows.dtype), saliency)


def _arrays(head: _Head, payload: memoryview) -> dict[str, Tensor]:
    if tuple(header.name for header in head.arrays) != _NAMES[head.storage]:
        raise WireError("Expected a record with the arrays of its storage, but it has others")
    check_layout(head.arrays, len(payload), 0)
    return {header.name: to_torch(_array(header, payload), header) for header in head.arrays}


def _array(header: ArrayHeader, payload: memoryview) -> Array:
    return array_from(header, payload[header.offset : header.offset + checked_bytes(header)])


def _expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise WireError("Expected a record of this encoder's shape, but it has another")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(parts: Iterable[Buffer]) -> bytes:
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()
