"""VecAttention (arXiv 2603.29494)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import (
    Lists,
    RowBlocks,
    assemble,
    listed,
    row_blocks,
    row_order,
    sink_and_band,
    stacked,
)
from mmserve.attention.patterns.scores import block_size, products
from mmserve.kernels import pattern_index
from mmserve.kernels.pattern_index.naive import pool_rows
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class VecAttention(AttentionPattern):
    """A block of rows shares single keys: those whose weight is near the largest of the keys around them.

    A key stays where its score with the mean query is at least the largest of its `tile_keys` keys plus
    log(`threshold`) (minS); 0 compares with all that the rows see before themselves. The first `block` keys
    and the rows' own are always seen. The authors judge video understanding with tiles of 16 x 16 keys, one
    threshold for all heads, and generation with one tile. What differs: the largest of a tile is that of
    the whole tile, where their kernel compares with the largest so far; keys behind the block of rows count
    for nothing; with one tile it is the largest of all keys, the first and own ones too.
    """

    name: ClassVar[str] = "vecattention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.29494"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    threshold: float = number(0.8, 0, 1, "the share of the largest weight of its tile that a key needs")
    tile_keys: int = whole(256, 0, 1 << 30, "keys of a tile; 0: all are one")
    block: int = block_size(64, "rows that share their keys, and keys that are always seen")

    @classmethod
    def everything(cls) -> Self:
        return cls(threshold=0.0)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.block)
        gap = -math.log(self.threshold) if self.threshold else math.inf
        if int(view.rows[(len(rows.first) - 1) * self.block]) <= self.block:
            columns = None  # no key lies between the first and the own ones
        else:
            columns = _tiled(view, rows, self.tile_keys, gap) if self.tile_keys else _untiled(view, rows, gap)
        return assemble(view, rows, runs=sink_and_band(rows, self.block, rows.first), columns=columns)


def _tiled(view: ChunkView, rows: RowBlocks, tile: int, gap: float) -> Lists:
    """Keys near the largest of their tile, one KV head at a time: scores of all heads are large."""
    before = int(view.rows[(len(rows.first) - 1) * rows.size])  # keys that some block has before it
    mean = pool_rows(view.queries, rows.size).to(view.queries.dtype)
    place = torch.arange(before, device=mean.device)
    hidden = (place < rows.size) | (place >= rows.first[:, None])
    group = mean.shape[1] // view.keys.shape[1]
    lists = []
    for head in range(view.keys.shape[1]):
        own = mean[:, head * group : (head + 1) * group]
        scores = products(own, view.keys[:before, head : head + 1]).float() * view.scale
        scores = functional.pad(
            scores.masked_fill_(hidden, -torch.inf), (0, -before % tile), value=-torch.inf
        )
        tiles = scores.unflatten(2, (-1, tile))
        kept = (tiles >= tiles.amax(-1, keepdim=True) - gap).flatten(2)[..., :before]
        lists.append(listed(kept & ~hidden, place))
    return stacked(lists)


def _untiled(view: ChunkView, rows: RowBlocks, gap: float) -> Lists:
    """Keys near the largest of all that the block's last row sees."""
    found = pattern_index.select_columns(
        view.queries.contiguous(),
        view.keys.contiguous(),
        row_order(view),
        None,
        rows.first.int(),
        block=rows.size,
        scale=view.scale,
        alpha=gap,
        sink=rows.size,
        capacity=max(1, int(view.rows[-1])),
    )
    capacity = found.columns.shape[2]
    begin = torch.arange(found.counts.numel(), device=found.counts.device).view(found.counts.shape)
    return Lists(found.columns.flatten(), begin * capacity, found.counts.long())
