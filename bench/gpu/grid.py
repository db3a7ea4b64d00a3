"""The grid pattern of MMInference as an `AttentionIndex`, built on the device without waiting for it.

Every row sees a sink, a local band and one *class*: the keys p, p + s, p + 2 s, ... (vertical lines). The
rows of the class (horizontal lines) and those of the prompt's tail see all before them. Each query head
chooses its stride s and class p from the weights of the last rows; a head without a clear grid stays dense.
Slash lines are left out. Knows nothing about models or time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.kernels.pattern_index import probe, residue_scores
from mmserve.kernels.prefill_attention.index import TILE_FIELDS, AttentionIndex

PROBED_ROWS = 64
# tokens per frame, or per row of patches, that video models have, and numbers near them
STRIDES = (64, 72, 81, 98, 100, 128, 144, 169, 170, 182, 195, 196, 197, 210, 224, 255, 256, 257, 288, 324,
           392, 512, 576, 729)  # fmt: skip
RUNS = 3  # of a tile of plain rows: sink, local band, class


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes of the pattern, in tokens."""

    strides: tuple[int, ...] = STRIDES
    sink: int = 128
    local: int = 1024
    tail: int = 128
    min_lift: float = 0.1  # below it a head stays dense
    tile_rows: int = 128


class Choice(NamedTuple):
    """What each query head does, [Hq]."""

    stride: Tensor  # int32
    first: Tensor  # int32: key p of its class, below the stride
    is_grid: Tensor  # bool


class _Tiles(NamedTuple):
    """Tiles of one kind, [Hq, n, ...], int32; a head may have fewer, those have no rows."""

    begin: Tensor  # in the list of rows
    rows: Tensor  # how many
    runs: Tensor  # [Hq, n, runs of a tile, 3]


def choose(q: Tensor, k: Tensor, strides: Tensor, grid: Grid, *, scale: float) -> Choice:
    """For q [S, Hq, d] and k [S, Hkv, d]; strides are those of `grid`, int32 on the device."""
    rows = min(PROBED_ROWS, len(q))
    order = torch.arange(len(q) - rows, len(q), dtype=torch.int32, device=q.device)
    vertical = probe(q[-rows:], k, order, None, scale=scale).vertical
    found = residue_scores(vertical, strides, first=grid.sink, last=len(k) - grid.local)
    lift, at = found.lift.max(1, keepdim=True)
    return Choice(strides[at[:, 0]], found.residue.gather(1, at)[:, 0], lift[:, 0] > grid.min_lift)


def index_of(choice: Choice, length: int, kv_heads: int, grid: Grid) -> AttentionIndex:
    """One sequence of `length` rows and keys. The sizes of its lists follow from length and grid alone."""
    device, heads = choice.stride.device, len(choice.stride)
    before = max(0, length - grid.tail)  # rows before the tail
    most = -(-before // min(grid.strides))  # rows of a class
    stride, first = choice.stride[:, None], choice.first[:, None]
    counts = _keys_below(torch.full_like(first, before), first, stride)
    place = torch.arange(before, dtype=torch.int32, device=device)
    lists = (
        _plain_row(place, first, stride),
        first + stride * place[:most],
        torch.arange(before, length, dtype=torch.int32, device=device),
    )
    begins = torch.arange(heads, device=device, dtype=torch.int32)[:, None]
    kinds = (
        _plain_tiles(choice, before, begins * before, before - counts, grid),
        _class_tiles(choice, most, heads * before + begins * most, counts, grid),
        _tail_tiles(heads * (before + most), before, length, begins, grid),
    )
    tiles, runs = _packed(kinds)
    return AttentionIndex(
        tile_rows=grid.tile_rows,
        block_size=grid.tile_rows,
        tiles=tiles,
        rows=torch.cat([rows.flatten() for rows in lists]),
        runs=runs,
        blocks=place[:0],
        columns=place[:0],
        row_order=torch.arange(length, dtype=torch.int32, device=device),
        key_begin=torch.zeros(1, kv_heads, dtype=torch.int64, device=device),
    )


def pairs_of(index: AttentionIndex) -> float:
    """Products of a query and a key that the index asks for, masked ones too; waits for the device."""
    ends = torch.cat([index.runs.new_zeros(1, dtype=torch.int64), index.runs[:, 2].cumsum(0)])
    begin, count = index.tiles[:, 4].long(), index.tiles[:, 5].long()
    return float((index.tiles[:, 3] * (ends[begin + count] - ends[begin])).sum())


def _plain_tiles(choice: Choice, before: int, begin: Tensor, rows: Tensor, grid: Grid) -> _Tiles:
    """Rows outside the class, `rows` of them in a head: sink, local band, and the class between them."""
    stride, first = choice.stride[:, None], choice.first[:, None]
    start = _tile_starts(before, grid, begin)
    count = (rows - start).clamp(0, grid.tile_rows)
    earliest = _plain_row(start, first, stride)
    end = _plain_row(start + count.clamp(min=1) - 1, first, stride) + 1
    # a head without a grid has a local band that is everything
    is_grid = choice.is_grid[:, None].int()
    local = (earliest - grid.local).clamp(min=grid.sink) * is_grid
    sink = end.clamp(max=grid.sink) * is_grid
    class_first = first + stride * _keys_below(torch.full_like(first, grid.sink), first, stride)
    lines = _keys_below(local, class_first, stride) * is_grid
    zero, one = torch.zeros_like(local), torch.ones_like(local)
    runs = (
        (zero, one, sink),
        (local, one, (end - local).clamp(min=0)),
        (class_first.expand_as(local), stride.expand_as(local), lines),
    )
    return _Tiles(begin + start, count, torch.stack([torch.stack(run, -1) for run in runs], 2))


def _class_tiles(choice: Choice, most: int, begin: Tensor, rows: Tensor, grid: Grid) -> _Tiles:
    """Rows of the class see everything before them; a tile's rows are far apart, so that ends are ragged."""
    start = _tile_starts(most, grid, begin)
    count = (rows - start).clamp(0, grid.tile_rows)
    end = choice.first[:, None] + choice.stride[:, None] * (start + count.clamp(min=1) - 1) + 1
    return _Tiles(begin + start, count, _dense_runs(end))


def _tail_tiles(begin: int, before: int, length: int, heads: Tensor, grid: Grid) -> _Tiles:
    start = _tile_starts(length - before, grid, heads).expand(len(heads), -1)
    count = (length - before - start).clamp(max=grid.tile_rows)
    return _Tiles(begin + start, count, _dense_runs(before + start + count))


def _dense_runs(end: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(end), torch.ones_like(end), end], -1)[:, :, None]


def _packed(kinds: tuple[_Tiles, ...]) -> tuple[Tensor, Tensor]:
    """Records of all tiles, those with most keys first, and their runs."""
    runs = torch.cat([kind.runs.flatten(0, 2) for kind in kinds])
    records, costs, run_begin = [], [], 0
    for kind in kinds:
        heads, tiles, many = kind.runs.shape[:3]
        record = kind.rows.new_zeros(heads, tiles, TILE_FIELDS)
        record[..., 1] = torch.arange(heads, device=runs.device)[:, None]
        record[..., 2], record[..., 3] = kind.begin, kind.rows
        at = torch.arange(heads * tiles, device=runs.device).view(heads, tiles)
        record[..., 4], record[..., 5] = run_begin + many * at, many
        # the heads of one tile are neighbours, so that they read the same keys at the same time
        records.append(record.transpose(0, 1).flatten(0, 1))
        cost = kind.runs[..., 2].sum(-1) * (kind.rows > 0)
        costs.append(cost.T.flatten())
        run_begin += many * heads * tiles
    order = torch.argsort(torch.cat(costs), descending=True, stable=True)
    return torch.cat(records)[order], runs


def _tile_starts(rows: int, grid: Grid, like: Tensor) -> Tensor:
    return torch.arange(0, rows, grid.tile_rows, dtype=torch.int32, device=like.device)[None]


def _plain_row(place: Tensor, first: Tensor, stride: Tensor) -> Tensor:
    """The row at a place of the list of rows outside the class: of each stride one is missing."""
    skipped = (place - first).div(stride - 1, rounding_mode="floor") + 1
    return place + torch.where(place < first, 0, skipped)


def _keys_below(end: Tensor, first: Tensor, stride: Tensor) -> Tensor:
    """How many of first, first + stride, ... are below `end`."""
    return ((end - first + stride - 1).div(stride, rounding_mode="floor")).clamp(min=0)
