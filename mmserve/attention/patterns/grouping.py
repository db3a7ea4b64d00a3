"""Rows of a chunk as tiles, head by head: blocks of one modality, rows of one residue class, and dense rows.

Knows nothing about keys, scores or kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmserve.attention.patterns.boundary import Flags, Ints, Longs

ALL, TEXT, DENSE = 0, 1, 2  # what the rows of a tile are: all or those of vision, those of text, dense ones


class RowPlan(NamedTuple):
    """What each head does with the rows of a chunk, [Hq]."""

    is_split: Flags  # rows of text are apart from those of vision
    text_is_dense: Flags  # rows of text see everything
    # rows at line_first, line_first + line_stride, ... see everything; stride 0: none do
    line_stride: Longs
    line_first: Longs
    # rows of vision of one class of this stride are together; stride 0: rows side by side are
    own_stride: Longs
    counts_slots: Flags  # strides count slots of the prompt, not those of vision


class Tiles(NamedTuple):
    """int64 [tiles]; the rows of a tile are rows[begin : begin + height], ascending."""

    head: Longs
    kind: Longs
    begin: Longs
    height: Longs
    rows: Ints


def group_rows(plan: RowPlan, slots: Ints, vision: Ints, *, block: int, tile_rows: int) -> Tiles:
    """Tiles of all heads for rows at these slots; `vision` is their place among vision, -1 for text.

    Rows side by side of one kind are cut every `block`, before dense rows are taken out of them.
    """
    is_dense = dense_rows(plan, slots, vision)
    is_text = vision < 0
    parts = []
    for is_split in (False, True):
        heads = np.flatnonzero((plan.is_split == is_split) & (plan.own_stride == 0))
        if len(heads):
            groups = [~is_text, is_text] if is_split else [np.ones(len(slots), np.bool_)]
            parts.append(_blocks(heads, ~is_dense[heads], groups, block))
    for head in np.flatnonzero(plan.own_stride > 0):
        parts.append(_own_classes(int(head), plan, ~is_dense[head], slots, vision, block, tile_rows))
    parts.append(_dense(is_dense, tile_rows))
    return _joined(parts)


def dense_rows(plan: RowPlan, slots: Ints, vision: Ints) -> Flags:
    """Which rows of which head see everything, bool [Hq, n]."""
    is_text = vision < 0
    found = (plan.text_is_dense & plan.is_split)[:, None] & is_text
    for counts_slots, place in ((False, vision), (True, slots)):
        heads = np.flatnonzero((plan.counts_slots == counts_slots) & (plan.line_stride > 0))
        if len(heads):
            on_line = place % plan.line_stride[heads, None] == plan.line_first[heads, None]
            found[heads] |= on_line if counts_slots else on_line & ~is_text
    return found


def _blocks(heads: Longs, keeps: Flags, groups: list[Flags], block: int) -> Tiles:
    """The kept rows [heads, n] of each group, cut every `block` rows of it."""
    order = np.concatenate([np.flatnonzero(group) for group in groups])
    starts, kinds, begin = [], [], 0
    for kind, group in enumerate(groups):
        size = int(group.sum())
        starts.append(np.arange(begin, begin + size, block))
        kinds.append(np.full(len(starts[-1]), kind))
        begin += size
    cuts, kind_of = np.concatenate(starts), np.concatenate(kinds)
    kept = keeps[:, order]
    rows = np.broadcast_to(order.astype(np.int32), kept.shape)[kept]
    counts = np.add.reduceat(kept, cuts, axis=1, dtype=np.int64)
    return _tiles(heads, kind_of, counts, rows)


def _own_classes(
    head: int, plan: RowPlan, keeps: Flags, slots: Ints, vision: Ints, block: int, tile_rows: int
) -> Tiles:
    """Rows of vision by their residue class, up to `tile_rows` of one class; those of text in blocks."""
    place = slots if plan.counts_slots[head] else vision
    stride = int(plan.own_stride[head])
    by_class = np.flatnonzero(keeps & ((vision >= 0) | plan.counts_slots[head]))
    residue = place[by_class] % stride
    sort = np.argsort(residue, kind="stable")
    by_class, residue = by_class[sort], residue[sort]
    begins = np.flatnonzero(np.diff(residue, prepend=-1))
    inside = np.arange(len(residue)) - np.repeat(begins, np.diff(begins, append=len(residue)))
    cuts = np.flatnonzero(inside % tile_rows == 0)
    counts = np.diff(cuts, append=len(residue))
    one = np.array([head])
    classes = _tiles(one, np.full(len(cuts), ALL), counts[None], by_class.astype(np.int32))
    others = keeps.copy()
    others[by_class] = False
    if not others.any():
        return classes
    groups = [np.zeros_like(others), others] if plan.is_split[head] else [others]
    return _joined([classes, _blocks(one, others[None], groups, block)])


def _dense(is_dense: Flags, tile_rows: int) -> Tiles:
    heads = np.arange(len(is_dense))
    totals = is_dense.sum(1)
    starts = np.arange(0, max(int(totals.max(initial=0)), 1), tile_rows)
    counts = np.clip(totals[:, None] - starts, 0, tile_rows)
    rows = np.nonzero(is_dense)[1].astype(np.int32)
    return _tiles(heads, np.full(len(starts), DENSE), counts, rows)


def _tiles(heads: Longs, kinds: Longs, counts: Longs, rows: Ints) -> Tiles:
    """Tiles whose rows follow each other, counts [heads, tiles of a head]; those of no row are left out."""
    flat = counts.flatten()
    some = flat > 0
    head, kind = np.repeat(heads, counts.shape[1]), np.tile(kinds, len(heads))
    return Tiles(head[some], kind[some], (np.cumsum(flat) - flat)[some], flat[some], rows)


def _joined(parts: list[Tiles]) -> Tiles:
    offsets = np.cumsum([0, *(len(part.rows) for part in parts)])[:-1]
    moved = [part._replace(begin=part.begin + offset) for part, offset in zip(parts, offsets, strict=True)]
    return Tiles(*(np.concatenate(column) for column in zip(*moved, strict=True)))
