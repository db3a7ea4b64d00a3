"""From the lines of every head to the `AttentionIndex` of a chunk, all tiles at once.

Works on the host, on a few numbers per tile. Knows nothing about how lines are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.boundary import AllWindows, Flags, Gathered, Ints, Longs, all_windows
from mmserve.attention.patterns.grouping import ALL, DENSE, TEXT, RowPlan, Tiles, group_rows
from mmserve.attention.patterns.online import (
    Found,
    Group,
    few_text,
    is_split,
    needs_probe,
    parts_of,
    row_group,
)
from mmserve.attention.patterns.verticals import Picked, spans
from mmserve.attention.profile import Head
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import TILE_FIELDS

MIN_BLOCK = 16
MOST = 1 << 30  # keys: more than there are
GATHERING = 16  # rows whose products take as long as to gather the keys of a tile


class _Table(NamedTuple):
    """What heads do with rows of each kind: [2 kinds, Hq], and of sizes [2, Hq, 2 groups of keys]."""

    is_joint: Flags
    sink: Longs
    local: Longs
    stride: Longs  # of the class of keys that is seen; 0: none
    first: Longs
    own_stride: Longs  # of a row's own class, which it sees; 0: it does not


class _Places(NamedTuple):
    """The tiles of a chunk: slots of the first and last row, what is seen of each group of keys."""

    tiles: Tiles
    first: Ints
    last: Ints
    seen: AllWindows
    gathered: Gathered
    counts_slots: Flags  # [tiles] strides count slots of the prompt


class _Lists(NamedTuple):
    """Runs and single keys on the axis, and whose they are."""

    run_tile: Longs
    runs: Longs  # [runs, 3]
    key_tile: Longs
    keys: Longs


def build_index(
    view: ChunkView, gathered: Gathered, heads: Sequence[Head], found: Mapping[Group, Found]
) -> AttentionIndex:
    """The rows of a chunk as tiles, and the keys that each of them sees."""
    table = _table(heads, found)
    plan = _row_plan(view, heads, found, table)
    vision = np.where(view.is_visual[view.rows], gathered.before[view.rows], -1)
    # rows of a block share their local band: it should not be much longer than asked for
    block = int(table.local.min()) // 2 // MIN_BLOCK * MIN_BLOCK
    block = min(view.tile_rows, max(MIN_BLOCK, block))
    tiles = group_rows(plan, view.rows, vision, block=block, tile_rows=view.tile_rows)
    first, last = (
        view.rows[tiles.rows[at]] for at in (tiles.begin, tiles.begin + tiles.height - 1)
    )  # fmt: skip
    is_dense, which = tiles.kind == DENSE, (np.minimum(tiles.kind, TEXT), tiles.head)
    seen = all_windows(
        gathered,
        first,
        last,
        table.is_joint[which] | is_dense,
        np.where(is_dense[:, None], MOST, table.sink[which]),
        table.local[which],
    )
    places = _Places(tiles, first, last, seen, gathered, plan.counts_slots[tiles.head] & ~is_dense)
    lists = [_window_runs(places), _grid_lines(places, table)]
    for group, each in found.items():
        kind = TEXT if group == "text" else ALL
        for (head, part), picked in each.picked.items():
            mine = np.flatnonzero((tiles.head == head) & (tiles.kind == kind))
            if len(mine) and row_group(heads[head], kind) == group:
                keys: Group = "text" if part else "all" if table.is_joint[kind, head] else "vision"
                lists.append(_off_grid(places, table, _picked_lines(places, picked, mine, group, keys)))
    return _packed(view, places, lists)


def _table(heads: Sequence[Head], found: Mapping[Group, Found]) -> _Table:
    count = len(heads)
    table = _Table(
        np.zeros((2, count), np.bool_),
        *(np.zeros((2, count, 2), np.int64) for _ in range(2)),
        *(np.zeros((2, count), np.int64) for _ in range(3)),
    )
    for kind in (ALL, TEXT):
        for at, head in enumerate(heads):
            group = row_group(head, kind)
            parts = parts_of(head, group)
            lines = parts.first
            table.is_joint[kind, at] = parts.is_joint
            table.sink[kind, at] = lines.sink, parts.second.sink
            table.local[kind, at] = lines.local, parts.second.local
            if lines.pattern == "grid" and group in found:
                stride = found[group].stride[at]
                table.stride[kind, at] = stride if lines.vline else 0
                table.first[kind, at] = found[group].first[at]
                table.own_stride[kind, at] = stride if lines.same else 0
    return table


def _row_plan(view: ChunkView, heads: Sequence[Head], found: Mapping[Group, Found], table: _Table) -> RowPlan:
    has_few = few_text(view)
    splits = [is_split(head) for head in heads]
    stride, first = np.zeros(len(heads), np.int64), np.zeros(len(heads), np.int64)
    for at, head in enumerate(heads):
        group = row_group(head, ALL)
        if head.vision.pattern == "grid" and head.vision.hline and group in found:
            stride[at], first[at] = found[group].stride[at], found[group].first[at]
    return RowPlan(
        is_split=np.array(splits),
        text_is_dense=np.array([has_few and needs_probe(head, "text") for head in heads]),
        line_stride=stride,
        line_first=first,
        own_stride=table.own_stride[ALL],
        counts_slots=np.array([head.boundary == "no" for head in heads]),
    )


def _window_runs(places: _Places) -> _Lists:
    """Sinks and local bands of both modalities; a band that reaches the sink is one run with it."""
    begins, ends = [], []
    for windows, offset in ((places.seen.vision, 0), (places.seen.text, places.gathered.visual)):
        touches = windows.local_start <= windows.sink_stop
        begins += [np.zeros_like(windows.stop) + offset, windows.local_start + offset]
        ends += [np.where(touches, windows.stop, windows.sink_stop) + offset]
        ends += [np.where(touches, windows.local_start, windows.stop) + offset]
    tile = np.tile(np.arange(len(places.first)), len(begins))
    return _runs(tile, np.concatenate(begins), np.concatenate(ends))


def _grid_lines(places: _Places, table: _Table) -> _Lists:
    """The class of the grid and a row's own class, between sink and local band."""
    tiles, gathered = places.tiles, places.gathered
    some = np.flatnonzero(tiles.kind != DENSE)
    which = tiles.kind[some], tiles.head[some]
    counts_slots = places.counts_slots[some]
    first_row = places.first[some]
    own = np.where(counts_slots, first_row, gathered.before[first_row])
    own_stride, stride, first = table.own_stride[which], table.stride[which], table.first[which]
    residue = own % np.maximum(own_stride, 1)
    # a row's own class may be the one that is seen anyway
    own_stride = np.where((stride > 0) & (residue == first), 0, own_stride)
    is_own_row = (gathered.before[first_row + 1] > gathered.before[first_row]) | counts_slots
    own_stride = np.where(is_own_row, own_stride, 0)
    lists = []
    for step, begin in ((stride, first), (own_stride, residue)):
        for in_slots, windows in ((False, places.seen.vision), (True, places.seen.whole)):
            mine = np.flatnonzero((step > 0) & (counts_slots == in_slots))
            tile, by = some[mine], step[mine]
            start = begin[mine] + by * _steps(windows.sink_stop[tile] - begin[mine], by)
            runs = np.stack([start, by, _steps(windows.local_start[tile] - start, by)], 1)
            lists.append(_slot_lines(places, tile, runs) if in_slots else _Lists(tile, runs, *_NONE))
    return _joined(lists)


_NONE = (np.empty(0, np.int64), np.empty(0, np.int64))


def _steps(distance: Longs, stride: Longs) -> Longs:
    """How many strides reach at least so far."""
    steps: Longs = np.maximum(-(-distance // stride), 0)
    return steps


def _slot_lines(places: _Places, tile: Longs, runs: Longs) -> _Lists:
    """Runs of the prompt as it lies, as single keys: gathered by modality they are no runs."""
    count = runs[:, 2]
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    slots = np.repeat(runs[:, 0], count) + np.repeat(runs[:, 1], count) * inside
    return _Lists(_NONE[0], np.empty((0, 3), np.int64), np.repeat(tile, count), _on_axis(places, slots))


def _on_axis(places: _Places, slots: Longs) -> Longs:
    return places.gathered.places(slots.astype(np.int32)).astype(np.int64)


def _picked_lines(places: _Places, picked: Picked, mine: Longs, rows: Group, keys: Group) -> _Lists:
    """Single keys and diagonals of one head, in one group of keys, for its tiles `mine`."""
    gathered = places.gathered
    ends = places.first[mine], places.last[mine]
    if keys == "vision":
        window, offset = places.seen.vision, 0
        first, last = (gathered.before[slot + 1] - 1 for slot in ends)
    elif keys == "text":
        window, offset = places.seen.text, gathered.visual
        first, last = (slot - gathered.before[slot + 1] for slot in ends)
    else:
        window, offset = places.seen.whole, 0
        first, last = ends
    window = type(window)(*(each[mine] for each in window))
    is_own = rows == "all" or keys in ("all", rows)
    found = spans(picked, first.astype(np.int64), last.astype(np.int64), window, diagonal=is_own)
    tile, key_tile = mine[found.tile], mine[found.key_tile]
    if keys != "all":
        return _joined(
            [
                _runs(tile, found.start + offset, found.stop + offset),
                _Lists(_NONE[0], np.empty((0, 3), np.int64), key_tile, found.key + offset),
            ]
        )
    cuts = [gathered.before[cut].astype(np.int64) for cut in (found.start, found.stop)]
    text = [cut - seen + gathered.visual for cut, seen in zip((found.start, found.stop), cuts, strict=True)]
    singles = _Lists(_NONE[0], np.empty((0, 3), np.int64), key_tile, _on_axis(places, found.key))
    return _joined([_runs(tile, *cuts), _runs(tile, *text), singles])


def _off_grid(places: _Places, table: _Table, lists: _Lists) -> _Lists:
    """Without single keys that the grid of their tile has."""
    gathered, tile = places.gathered, lists.key_tile
    slots = gathered.slots[lists.keys]
    counts_slots = places.counts_slots[tile]
    is_counted = (lists.keys < gathered.visual) | counts_slots
    place = np.where(counts_slots, slots, gathered.before[slots])
    which = places.tiles.kind[tile], places.tiles.head[tile]
    row = places.first[tile]
    own = np.where(counts_slots, row, gathered.before[row])
    is_own = (gathered.before[row + 1] > gathered.before[row]) | counts_slots
    stride, own_stride = table.stride[which], table.own_stride[which]
    is_line = (stride > 0) & (place % np.maximum(stride, 1) == table.first[which])
    is_line |= (own_stride > 0) & is_own & ((place - own) % np.maximum(own_stride, 1) == 0)
    left = ~(is_line & is_counted)
    return lists._replace(key_tile=tile[left], keys=lists.keys[left])


def _runs(tile: Longs, start: Longs, stop: Longs) -> _Lists:
    """Runs of keys side by side; those of no key are left out."""
    some = start < stop
    runs = np.stack([start, np.ones_like(start), stop - start], 1)
    return _Lists(tile[some], runs[some], *_NONE)


def _joined(lists: Sequence[_Lists]) -> _Lists:
    return _Lists(*(np.concatenate(column) for column in zip(*lists, strict=True)))


def _packed(view: ChunkView, places: _Places, parts: Sequence[_Lists]) -> AttentionIndex:
    """Tiles with their lists, those that take longest first."""
    tiles, lists = places.tiles, _joined(parts)
    total, device = len(tiles.head), view.queries.device
    record = np.zeros((total, TILE_FIELDS), np.int32)
    record[:, 1], record[:, 2], record[:, 3] = tiles.head, tiles.begin, tiles.height
    some = lists.runs[:, 2] > 0
    run_tile, runs = lists.run_tile[some], lists.runs[some]
    # a list of rising keys is summed in the same steps whatever else the tile has
    run_order = np.lexsort((runs[:, 0], run_tile))
    key_order = np.lexsort((lists.keys, lists.key_tile))
    cost = np.bincount(run_tile, runs[:, 2], total)
    for column, owner in ((4, run_tile), (8, lists.key_tile)):
        count = np.bincount(owner, minlength=total)
        record[:, column], record[:, column + 1] = np.cumsum(count) - count, count
    cost += record[:, 9]
    launch = np.argsort(-cost * (tiles.height + GATHERING), kind="stable")
    slots = places.gathered.slots
    # of one modality alone the axis is the prompt
    is_moved = 0 < places.gathered.visual < len(slots)
    moved = torch.from_numpy(slots).to(device) if is_moved else None

    def tensor(values: Longs | Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

    return AttentionIndex(
        tile_rows=view.tile_rows,
        block_size=view.tile_rows,
        tiles=tensor(record[launch]),
        rows=tensor(tiles.rows),
        runs=tensor(runs[run_order]),
        blocks=tensor(_NONE[0]),
        columns=tensor(lists.keys[key_order]),
        row_order=tensor(view.rows),
        key_begin=torch.zeros(1, view.keys.shape[1], dtype=torch.int64, device=device),
        key_order=moved,
        key_slot=moved,
    )
