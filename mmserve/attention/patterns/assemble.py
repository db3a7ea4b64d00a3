"""Lists of blocks, runs and columns, one per block of rows, become an `AttentionIndex`.

What all patterns share: rows of a chunk are cut into blocks that see the same keys up to causality, heads and
blocks of rows share lists by offset, and every row sees itself. Knows nothing about scores, pages or models;
keys are slots, in order. Nothing here walks keys or tiles in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import TILE_FIELDS

# no kernel walks blocks in longer steps; blocks of other sizes are listed as runs
BLOCK_STEP = 64


class RowBlocks(NamedTuple):
    """The rows of a chunk in blocks of `size`, the last one as long as it is; int64 [blocks]."""

    size: int
    first: Tensor  # slot of the first row of each
    last: Tensor  # and of the last


class Lists(NamedTuple):
    """What each block of rows sees, list by list; lists may be shared. `heads` divides the query heads."""

    values: Tensor  # int32 [entries], or [entries, 3] of runs
    begins: Tensor  # int64 [heads, blocks]
    counts: Tensor  # int64 [heads, blocks]


def row_order(view: ChunkView) -> Tensor:
    """The slots of the rows on the device, int32 [n]."""
    return torch.tensor(view.rows, device=view.queries.device)


def row_blocks(view: ChunkView, size: int) -> RowBlocks:
    """Every `size` rows of the chunk, counted from its first row."""
    slots = row_order(view).long()
    last = torch.arange(size, len(slots) + size, size, device=slots.device).clamp(max=len(slots)) - 1
    return RowBlocks(size, slots[::size], slots[last])


def listed(seen: Tensor, values: Tensor) -> Lists:
    """The values where seen bool [heads, blocks, N] holds; values are [N] or as wide as `seen`."""
    count = seen.sum(-1)
    flat = torch.masked_select(values.expand(seen.shape), seen)
    return Lists(flat.int(), _begins(count), count)


def runs_of_blocks(seen: Tensor, block: int) -> Lists:
    """Blocks of keys seen bool [heads, row blocks, key blocks] as runs, neighbours in one."""
    edge = torch.zeros_like(seen[..., :1])
    padded = torch.cat([edge, seen, edge], -1)
    starts = listed(seen & ~padded[..., :-2], torch.arange(seen.shape[-1], device=seen.device))
    stops = listed(seen & ~padded[..., 2:], torch.arange(1, seen.shape[-1] + 1, device=seen.device))
    lengths = stops.values - starts.values
    runs = torch.stack([starts.values * block, torch.ones_like(lengths), lengths * block], 1)
    return starts._replace(values=runs)


def sink_and_band(rows: RowBlocks, sink: int, begin: Tensor) -> Lists:
    """The first `sink` keys, and those from begin int64 [blocks] to the block's last row, for all heads."""
    # a band that reaches the sink is one run with it
    begin = torch.where(begin <= sink, 0, begin).clamp(max=rows.first)
    runs = torch.ones(len(begin), 2, 3, dtype=torch.int32, device=begin.device)
    runs[:, 0, 0] = 0
    runs[:, 0, 2] = sink
    runs[:, 1, 0] = begin
    runs[:, 1, 2] = rows.last + 1 - begin
    apart = ((begin > 0) & (sink > 0)).long()
    place = 2 * torch.arange(len(begin), device=begin.device) + 1 - apart
    return Lists(runs.view(-1, 3), place[None], apart[None] + 1)


def joined(one: Lists, other: Lists) -> Lists:
    """One list of both; the caller knows that they are disjoint."""
    heads = max(len(one.begins), len(other.begins))
    parts = [
        Lists(part.values, *(at.repeat_interleave(heads // len(at), 0) for at in part[1:]))
        for part in (one, other)
    ]
    counts = parts[0].counts + parts[1].counts
    begins = target = _begins(counts)
    values = one.values.new_empty(int(counts.sum()), *one.values.shape[1:])
    for part in parts:
        length = part.counts.flatten()
        total = int(length.sum())
        # how far into its list an entry is, and where the list lies before and after
        inside = torch.arange(total, device=length.device) - _begins(length).repeat_interleave(
            length, output_size=total
        )
        source, place = (
            at.flatten().repeat_interleave(length, output_size=total) + inside for at in (part.begins, target)
        )
        values[place] = part.values[source]
        target = target + part.counts
    return Lists(values, begins, counts)


def stacked(lists: Sequence[Lists]) -> Lists:
    """The lists of some heads, then those of others."""
    begins, entries = [], 0
    for each in lists:
        begins.append(each.begins + entries)
        entries += len(each.values)
    return Lists(
        torch.cat([each.values for each in lists]),
        torch.cat(begins),
        torch.cat([each.counts for each in lists]),
    )


def from_blocks(view: ChunkView, rows: RowBlocks, seen: Tensor, *, block: int) -> AttentionIndex:
    """Blocks of `block` keys seen bool [heads, row blocks, key blocks]; a block of rows always sees its own.

    What lies behind its last row does not count.
    """
    own = rows.first // block
    runs = sink_and_band(rows, 0, own * block)
    places = torch.arange(seen.shape[-1], device=seen.device)
    # all of these are whole
    earlier = seen & (places < own[:, None])
    if block % BLOCK_STEP == 0:
        return assemble(view, rows, runs=runs, blocks=listed(earlier, places), block=block)
    return assemble(view, rows, runs=joined(runs_of_blocks(earlier, block), runs))


def assemble(
    view: ChunkView,
    rows: RowBlocks,
    *,
    runs: Lists,
    blocks: Lists | None = None,
    columns: Lists | None = None,
    block: int = BLOCK_STEP,
) -> AttentionIndex:
    """The index of these lists, which name no key twice for one block of rows, and its rows' own."""
    n, heads, device = len(view.rows), view.queries.shape[1], view.queries.device
    height = min(rows.size, view.tile_rows)
    parts = -(-rows.size // height)
    part = torch.arange(len(rows.first) * parts, device=device)
    which = part // parts
    start = which * rows.size + part % parts * height
    end = torch.minimum(start + height, (which + 1) * rows.size).clamp(max=n)
    which, start, end = which[start < end], start[start < end], end[start < end]
    tiles = torch.zeros(len(start), heads, TILE_FIELDS, dtype=torch.int32, device=device)
    tiles[..., 1] = torch.arange(heads, device=device)
    tiles[..., 2] = start[:, None]
    tiles[..., 3] = (end - start)[:, None]
    keys = torch.zeros(len(start), heads, dtype=torch.int64, device=device)
    for column, lists, weight in (
        (4, runs, runs.values[:, 2]),
        (6, blocks, block),
        (8, columns, 1),
    ):
        if lists is None:
            continue
        share = heads // len(lists.begins)
        begin, count = (at.repeat_interleave(share, 0).T[which] for at in lists[1:])
        tiles[..., column], tiles[..., column + 1] = begin, count
        keys += _sums(weight, begin, count) if isinstance(weight, Tensor) else weight * count
    # longest first; the heads of one block of rows stay neighbours where they are alike
    launch = torch.argsort(keys.flatten(), descending=True, stable=True)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    return AttentionIndex(
        tile_rows=height,
        block_size=block,
        tiles=tiles.view(-1, TILE_FIELDS)[launch],
        rows=torch.arange(n, dtype=torch.int32, device=device),
        runs=runs.values.contiguous(),
        blocks=nothing if blocks is None else blocks.values,
        columns=nothing if columns is None else columns.values,
        row_order=row_order(view),
        key_begin=torch.zeros(1, view.keys.shape[1], dtype=torch.int64, device=device),
    )


def _begins(count: Tensor) -> Tensor:
    """Where lists of these lengths begin when they lie one after another."""
    return count.flatten().cumsum(0).view_as(count) - count


def _sums(values: Tensor, begin: Tensor, count: Tensor) -> Tensor:
    """Sums of stretches of values."""
    total = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
    total[1:] = values.cumsum(0)
    return total[begin + count] - total[begin]
