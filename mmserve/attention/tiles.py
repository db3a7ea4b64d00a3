"""Segments of prompts as tiles of the prefill kernel: see `visibility` for what a segment is.

Knows nothing about pages: the axis of a key is its place among the slots of its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.visibility import Run, Segment, runs_of
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import TILE_FIELDS
from mmserve.kv.table import IntArray

NATIVE_TILE_ROWS = 192  # that share what `cpu_tiles` has gathered


class Chunk(NamedTuple):
    """Packed rows [start, start + rows) of one sequence: its last slots, cut into `segments`, or one."""

    start: int
    rows: int
    segments: Sequence[Segment] | None = None


class _Tile(NamedTuple):
    axis: int
    rows: IntArray
    runs: list[Run]
    keys: int


def segmented_index(
    chunks: Sequence[Chunk], lengths: IntArray, *, group: int, tile_rows: int
) -> AttentionIndex:
    """What the rows of chunks see, where KV head h of chunk c is the axis c * kv_heads + h.

    `lengths` [chunks, kv_heads] are slots with the new ones; row r of head h is packed row r * kv_heads + h,
    and a row's order is its slot.
    """
    heads = lengths.shape[1]
    tiles = [
        tile
        for at, chunk in enumerate(chunks)
        for head in range(heads)
        for tile in _tiles(chunk, at * heads + head, int(lengths[at, head]), heads, tile_rows)
    ]
    # longest first
    tiles.sort(key=lambda tile: -tile.keys)
    records = np.zeros((len(tiles), group, TILE_FIELDS), np.int32)
    counts = np.array([(len(tile.rows), len(tile.runs)) for tile in tiles], np.int32)
    records[..., 0] = np.array([tile.axis for tile in tiles], np.int32)[:, None]
    records[..., 1] = np.arange(group)
    for column, count in ((2, counts[:, 0]), (4, counts[:, 1])):
        records[..., column] = (np.cumsum(count) - count)[:, None]
        records[..., column + 1] = count[:, None]
    packed = sum(chunk.rows for chunk in chunks) * heads
    orders = np.empty(packed, np.int32)
    for at, chunk in enumerate(chunks):
        places = (chunk.start + np.arange(chunk.rows)) * heads
        for head in range(heads):
            orders[places + head] = lengths[at, head] - chunk.rows + np.arange(chunk.rows)
    nothing = torch.empty(0, dtype=torch.int32)
    return AttentionIndex(
        tile_rows=tile_rows,
        block_size=tile_rows,
        tiles=torch.from_numpy(records.reshape(-1, TILE_FIELDS)),
        rows=torch.from_numpy(np.concatenate([tile.rows for tile in tiles])),
        runs=torch.tensor([run for tile in tiles for run in tile.runs], dtype=torch.int32),
        blocks=nothing,
        columns=nothing,
        row_order=torch.from_numpy(orders),
        key_begin=torch.zeros(lengths.size, 1, dtype=torch.int64),
    )


def _tiles(chunk: Chunk, axis: int, slots: int, heads: int, tile_rows: int) -> Iterator[_Tile]:
    older = slots - chunk.rows
    for segment in chunk.segments or [Segment(older, slots, np.arange(older))]:
        seen = runs_of(segment.seen)
        # what is seen of the past often ends where the segment begins
        joined = bool(seen) and seen[-1].stride == 1 and sum(seen[-1][::2]) == segment.start
        begin = seen.pop().start if joined else segment.start
        past = sum(run.length for run in seen)
        for first in range(segment.start, segment.stop, tile_rows):
            stop = min(first + tile_rows, segment.stop)
            rows = (chunk.start + np.arange(first, stop) - older) * heads + axis % heads
            runs = [*seen, Run(begin, 1, stop - begin)]
            yield _Tile(axis, rows.astype(np.int32), runs, past + stop - begin)


def head_by_head(index: AttentionIndex, begin: Tensor, *, group: int) -> AttentionIndex:
    """An index of one sequence whose KV heads become sequences of one head, from begin int64 [kv_heads] on.

    The packed row r of KV head h is row r * kv_heads + h, of `group` query heads.
    """
    heads = len(begin)
    kv_head = index.tiles[:, 1] // group
    tiles = index.tiles.clone()
    tiles[:, 0], tiles[:, 1] = kv_head, index.tiles[:, 1] % group
    tiles[:, 2] += kv_head * len(index.rows)
    numbers = torch.arange(heads, dtype=torch.int32, device=index.rows.device)
    return replace(
        index,
        tiles=tiles,
        rows=(index.rows * heads + numbers[:, None]).flatten(),
        row_order=index.row_order.repeat_interleave(heads),
        key_begin=begin[:, None],
    )


def tile_rows_for(pages: Tensor) -> int:
    """Rows per tile that the kernels want for keys in these pages [pages, page_size, d]."""
    if backend_for(pages.device) == "naive":
        return NATIVE_TILE_ROWS
    # triton is imported only where it runs
    from mmserve.kernels.prefill_attention.triton import default_tile_rows

    return default_tile_rows(pages.shape[2], pages.dtype.itemsize)
