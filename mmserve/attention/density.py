"""How much of dense attention an index computes: pairs of a row and a key, counted without scores.

A tile counts the keys that its last row may see, for all of its rows: that is what a kernel computes. Knows
nothing about patterns or prompts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.kernels.prefill_attention import AttentionIndex


class Pairs(NamedTuple):
    """Of one layer, int64 tensors of no dimension."""

    computed: Tensor
    dense: Tensor  # as many a dense index of the same tiles has


def pairs_of(index: AttentionIndex, *, head: int | None = None) -> Pairs:
    """The pairs of an index of one sequence, of all query heads or one."""
    tiles = index.tiles.long()
    if head is not None:
        tiles = tiles[tiles[:, 1] == head]
    owner, place = _entries(tiles[:, 2:4])
    orders = index.row_order[index.rows[place].long()].long()
    last = orders.new_full((len(tiles),), -1).scatter_reduce(0, owner, orders, "amax")
    seen = _seen(index, tiles, last)
    rows = tiles[:, 3]
    return Pairs((rows * seen).sum(), (rows * (last + 1)).sum())


def _seen(index: AttentionIndex, tiles: Tensor, last: Tensor) -> Tensor:
    """How many of its keys the last row of each tile may see."""
    run_owner, run = _entries(tiles[:, 4:6])
    start, stride, length = index.runs[run].long().unbind(1)
    block_owner, block = _entries(tiles[:, 6:8])
    begin = index.blocks[block].long() * index.block_size
    owner = torch.cat([run_owner, block_owner])
    start = torch.cat([start, begin])
    stride = torch.cat([stride, torch.ones_like(begin)])
    length = torch.cat([length, torch.full_like(begin, index.block_size)])
    seen = torch.zeros_like(last)
    for first, visible in _pieces(index.key_order, last):
        # of the axis from `first` on, `visible` keys: where the run enters and leaves them
        low = _steps(first - start, stride, length)
        high = _steps(first + visible[owner] - start, stride, length)
        seen.scatter_add_(0, owner, high - low)
    owner, column = _entries(tiles[:, 8:10])
    key = index.columns[column].long()
    orders = key if index.key_order is None else index.key_order[key].long()
    return seen.scatter_add_(0, owner, (orders <= last[owner]).long())


def _pieces(key_order: Tensor | None, last: Tensor) -> list[tuple[int, Tensor]]:
    """Stretches of the axis whose orders ascend: where each begins, and how many of it each tile sees."""
    if key_order is None:
        return [(0, last + 1)]
    orders = key_order.long()
    cuts = [0, *((orders.diff() < 0).nonzero().flatten() + 1).tolist(), len(orders)]
    return [
        (first, torch.searchsorted(orders[first:stop].contiguous(), last, right=True))
        for first, stop in pairwise(cuts)
    ]


def _steps(distance: Tensor, stride: Tensor, length: Tensor) -> Tensor:
    """How many of a run's keys lie before `distance` from its start."""
    steps = torch.div(distance + stride - 1, stride, rounding_mode="floor")
    return torch.minimum(steps.clamp(min=0), length)


def _entries(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Of lists (first, count) [tiles, 2]: the tile of each entry, and its place."""
    first, count = spans.unbind(1)
    owner = torch.repeat_interleave(count)
    ends = count.cumsum(0)
    return owner, torch.arange(len(owner), device=owner.device) - (ends - count - first)[owner]
