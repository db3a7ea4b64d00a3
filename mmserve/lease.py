"""Where bulk arrays lie that one process has published for another, and which they are. Plain data."""

from __future__ import annotations

import msgspec


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ArrayHeader(_Data, frozen=True):
    """Where one array lies inside a lease's file and how to read it."""

    name: str
    dtype: str  # a name from wire.DTYPES; "bfloat16" is stored as uint16 bits
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class Lease(_Data, frozen=True):
    """Read access to named arrays in one file, until released or expired.

    On one host the reader maps it; where its owner has an endpoint, the reader asks there for its pieces.
    """

    lease_id: str  # 128 random bits in hex
    path: str
    total_bytes: int
    arrays: tuple[ArrayHeader, ...]
    checksum: int  # crc32 of the array headers, repeated at the start of the file
    crc: int | None = None  # crc32 of all arrays' bytes in order, where the owner made one
    endpoint: str = ""


class EncodedFrames(_Data, frozen=True):
    """Frames of a video before reduction: arrays "embeddings" [n, N, D] and "saliency" fp32 [n, N].

    `lost` did not decode; without a lease none did.
    """

    positions: tuple[int, ...]
    lost: tuple[int, ...]
    lease: Lease | None


class EncodedPart(_Data, frozen=True):
    """A run of one item's tokens, encoded and reduced: what of its `tokens` placeholder tokens is `kept`.

    The lease's arrays, row by row: "embeddings" [kept, D], with "scale" fp32 [kept] where they are rounded to
    a byte; "source" int32 [kept], the row's index among the part's tokens; "frame" int32 [kept], the frame of
    the part that it belongs to, -1 for rows of none; "key" uint8 [kept, 16] and "index" int32 [kept], which
    together say what a row is: equal ones, equal rows, whatever the item was cut into.
    """

    lease: Lease
    tokens: int
    kept: int
    guarded: bool = False  # none of it is to be dropped inside the model either
    frame_tokens: int = 0  # of each frame of a video
