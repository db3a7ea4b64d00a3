"""What every query row sees, as plain tensors: one object for the oracle, the CPU and the GPU kernel.

Knows nothing about scores, models or where a pattern comes from.

A *tile* is a set of rows of one (sequence, query head) that see the same keys, up to causality. Keys are
addressed on the *axis* of their KV head, 0 to its length: runs (start, stride, length), blocks and single
columns. `order` is a key's or a row's place in the uncompressed prompt; a row sees a key of its tile when
`order_k <= order_q`. The axis may list keys in any order (vision first, for instance): then `key_order` says
the order of each, and `key_slot` where it is stored if storage was not permuted with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

TILE_FIELDS = 10  # columns of `AttentionIndex.tiles`


class Tile(NamedTuple):
    """One tile as Python values; `rows` are rows of the packed queries, keys are places on the axis."""

    sequence: int
    head: int
    rows: Sequence[int]
    runs: Sequence[tuple[int, int, int]] = ()
    blocks: Sequence[int] = ()
    columns: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionIndex:
    """Tiles in launch order (longest first keeps a GPU full) and the lists that they point into.

    Guaranteed by builders, verified by `check_index`: no key twice in one tile, each row of a head in at most
    one tile, blocks entirely on the axis (its ragged end is a run), every run and column on the axis.
    Lists may be shared by tiles. A tile of no rows is skipped, so a builder on a GPU may over-allocate.
    """

    tile_rows: int  # most rows of one tile
    block_size: int  # keys of one block
    # int32 [tiles, 10]: sequence, query head, then (first, count) in rows, runs, blocks, columns
    tiles: Tensor
    rows: Tensor  # int32: rows of the packed queries
    runs: Tensor  # int32 [runs, 3]: start, stride >= 1, length
    blocks: Tensor  # int32: block b is the keys [b * block_size, (b + 1) * block_size)
    columns: Tensor  # int32: single keys
    row_order: Tensor  # int32 [rows of the packed queries]
    # int64 [sequences, KV heads]: where each axis begins in key_order and key_slot, and in contiguous K and V
    key_begin: Tensor
    key_order: Tensor | None = None  # int32; None: key j of every axis has order j
    key_slot: Tensor | None = None  # int32: storage row of each key, from key_begin on; None: key j is row j

    def to(self, device: torch.device | str) -> AttentionIndex:
        """The same index on another device."""
        return replace(
            self,
            tiles=self.tiles.to(device),
            rows=self.rows.to(device),
            runs=self.runs.to(device),
            blocks=self.blocks.to(device),
            columns=self.columns.to(device),
            row_order=self.row_order.to(device),
            key_begin=self.key_begin.to(device),
            key_order=None if self.key_order is None else self.key_order.to(device),
            key_slot=None if self.key_slot is None else self.key_slot.to(device),
        )


def pack_tiles(
    tiles: Sequence[Tile],
    *,
    row_order: Tensor,
    key_begin: Tensor,
    tile_rows: int = 128,
    block_size: int = 64,
    key_order: Tensor | None = None,
    key_slot: Tensor | None = None,
) -> AttentionIndex:
    """An index of these tiles in this order; equal lists are stored once."""
    lists: tuple[dict[tuple[object, ...], int], ...] = ({}, {}, {}, {})
    flat: tuple[list[object], ...] = ([], [], [], [])
    table: list[list[int]] = []
    for tile in tiles:
        record = [tile.sequence, tile.head]
        for values, known, store in zip(tile[2:], lists, flat, strict=True):
            key = tuple(values)
            if key not in known:
                known[key] = len(store)
                store.extend(key)
            record += [known[key], len(key)]
        table.append(record)
    device = row_order.device
    rows, runs, blocks, columns = (torch.tensor(store, dtype=torch.int32, device=device) for store in flat)
    return AttentionIndex(
        tile_rows=tile_rows,
        block_size=block_size,
        tiles=torch.tensor(table, dtype=torch.int32, device=device).view(-1, TILE_FIELDS),
        rows=rows,
        runs=runs.view(-1, 3),
        blocks=blocks,
        columns=columns,
        row_order=row_order,
        key_begin=key_begin,
        key_order=key_order,
        key_slot=key_slot,
    )


def dense_index(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    q_heads: int,
    kv_heads: int,
    query_starts: Sequence[int] | None = None,
    tile_rows: int = 128,
    device: torch.device | str = "cpu",
) -> AttentionIndex:
    """Causal attention of a variable-length batch: one tile class with one run.

    Row i of sequence b has order query_starts[b] + i; by default the queries are the last of the keys. With
    a start at or past the end of the keys, every row sees all of them (a chunk against its cached prefix).
    """
    starts = query_starts or [k - q for q, k in zip(query_lengths, key_lengths, strict=True)]
    records: list[tuple[int, int, int, int]] = []  # sequence, first row, rows, run
    runs: list[tuple[int, int, int]] = []
    orders: list[Tensor] = []
    begins: list[int] = []
    packed = axis = 0
    for sequence, (rows, keys, start) in enumerate(zip(query_lengths, key_lengths, starts, strict=True)):
        for first in range(0, rows, tile_rows):
            count = min(tile_rows, rows - first)
            records.append((sequence, packed + first, count, len(runs)))
            runs.append((0, 1, max(0, min(keys, start + first + count))))
        orders.append(torch.arange(start, start + rows, dtype=torch.int32))
        begins.append(axis)
        packed, axis = packed + rows, axis + keys
    lengths = [runs[run][2] for *_, run in records]
    # longest first; the heads of one tile are neighbours, so that they read the same keys at the same time
    launch = sorted(range(len(records)), key=lambda at: -lengths[at])
    tiles = torch.zeros(len(records), q_heads, TILE_FIELDS, dtype=torch.int32)
    if records:
        table = torch.tensor([records[at] for at in launch], dtype=torch.int32)
        tiles[..., 0] = table[:, None, 0]
        tiles[..., 1] = torch.arange(q_heads)
        tiles[..., 2:4] = table[:, None, 1:3]
        tiles[..., 4] = table[:, None, 3]
        tiles[..., 5] = 1
    return AttentionIndex(
        tile_rows=tile_rows,
        block_size=tile_rows,
        tiles=tiles.view(-1, TILE_FIELDS),
        rows=torch.arange(packed, dtype=torch.int32),
        runs=torch.tensor(runs, dtype=torch.int32).view(-1, 3),
        blocks=torch.empty(0, dtype=torch.int32),
        columns=torch.empty(0, dtype=torch.int32),
        row_order=torch.cat([torch.empty(0, dtype=torch.int32), *orders]),
        key_begin=torch.tensor(begins, dtype=torch.int64)[:, None].repeat(1, kv_heads),
    ).to(device)


def tile_rows_of(index: AttentionIndex, tile: list[int]) -> Tensor:
    """Rows of the packed queries of one record of `tiles`."""
    return index.rows[tile[2] : tile[2] + tile[3]].long()


def tile_keys(index: AttentionIndex, tile: list[int]) -> Tensor:
    """All keys of one record of `tiles`, as places on the axis, int64."""
    device = index.rows.device
    runs = index.runs[tile[4] : tile[4] + tile[5]].tolist()
    parts = [start + stride * torch.arange(length, device=device) for start, stride, length in runs]
    blocks = index.blocks[tile[6] : tile[6] + tile[7]].long()
    inside = torch.arange(index.block_size, device=device)
    parts.append((blocks[:, None] * index.block_size + inside).flatten())
    parts.append(index.columns[tile[8] : tile[8] + tile[9]].long())
    return torch.cat(parts)


def check_index(
    index: AttentionIndex, key_lengths: Tensor, *, q_heads: int, sees_itself: bool = True
) -> None:
    """Raise ValueError where a builder's guarantee does not hold; for tests and tools, it reads the device.

    key_lengths is [sequences, KV heads]. `sees_itself`: every row must also see the key of its own order.
    """
    group = q_heads // key_lengths.shape[1]
    written: set[tuple[int, int]] = set()
    for at, tile in enumerate(index.tiles.tolist()):
        sequence, head = tile[:2]
        rows, keys = tile_rows_of(index, tile), tile_keys(index, tile)
        if len(rows) > index.tile_rows:
            raise ValueError(f"Expected at most {index.tile_rows} rows, but tile {at} has {len(rows)}")
        if len(rows) == 0:
            continue
        length = int(key_lengths[sequence, head // group])
        if ((keys < 0) | (keys >= length)).any():
            raise ValueError(f"Expected keys in [0, {length}), but tile {at} has {keys.tolist()}")
        if len(keys.unique()) != len(keys):
            raise ValueError(f"Expected every key once, but tile {at} has {keys.tolist()}")
        pairs = {(row, head) for row in rows.tolist()}
        if len(pairs) != len(rows) or pairs & written:
            raise ValueError(f"Expected every row of a head in one tile, but tile {at} repeats one")
        written |= pairs
        if sees_itself and not torch.isin(index.row_order[rows], key_orders(index, tile, keys, group)).all():
            raise ValueError(f"Expected every row to see itself, but a row of tile {at} does not")


def key_orders(index: AttentionIndex, tile: list[int], keys: Tensor, group: int) -> Tensor:
    """The orders of these keys of a tile's axis."""
    if index.key_order is None:
        return keys
    return index.key_order[index.key_begin[tile[0], tile[1] // group] + keys]


def key_slots(index: AttentionIndex, tile: list[int], keys: Tensor, group: int) -> Tensor:
    """The storage rows of these keys, counted from the beginning of their axis."""
    if index.key_slot is None:
        return keys
    return index.key_slot[index.key_begin[tile[0], tile[1] // group] + keys].long()
