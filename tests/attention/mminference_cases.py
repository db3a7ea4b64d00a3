"""Random prompts and heads for MMInference, and what each row of them sees by the plainest construction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmserve.attention.base import ChunkView, PatternMemory
from mmserve.attention.patterns.online import GROUPS, PROBED_ROWS, Found, Group, parts_of
from mmserve.attention.patterns.verticals import Picked
from mmserve.attention.profile import BOUNDARIES, PATTERNS, Head, Lines
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import key_orders, tile_keys, tile_rows_of

Mask = NDArray[np.bool_]
Layout = tuple[Mask, NDArray[np.int32], NDArray[np.int32]]  # is_visual, item and frame


def layout(rng: np.random.Generator, items: int, longest: int) -> Layout:
    """A prompt: text in pieces, clips, images between; sometimes there is no text or no item."""
    item, frame = list[int](), list[int]()
    frames = 0
    for number in range(items):
        text = int(rng.integers(0, longest))
        item += [-1] * text
        frame += [-1] * text
        size, count = int(rng.integers(1, longest)), int(rng.integers(1, 4))
        for _ in range(count):
            item += [number] * size
            frame += [frames] * size
            frames += 1
            # a time between frames, as some families write it
            separators = int(rng.integers(0, 3)) if rng.random() < 0.4 else 0
            item += [-1] * separators
            frame += [-1] * separators
    text = int(rng.integers(0 if item else 1, longest))
    item, frame = [*item, *[-1] * text], [*frame, *[-1] * text]
    of_item, of_frame = np.array(item, np.int32), np.array(frame, np.int32)
    return of_item >= 0, of_item, of_frame


def view_of(
    rng: np.random.Generator,
    parts: Layout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    start: int = 0,
    stop: int | None = None,
    tile_rows: int = 32,
    memory: PatternMemory | None = None,
) -> ChunkView:
    """Rows [start, stop) of a prompt of noise."""
    is_visual, item, frame = parts
    stop = len(is_visual) if stop is None else stop
    q, k, v = (
        torch.from_numpy(rng.standard_normal((stop, many, width)).astype(np.float32))
        for many in (heads, kv_heads, kv_heads)
    )
    return ChunkView(
        layer=0,
        layers=1,
        queries=q[start:],
        keys=k,
        values=v,
        rows=np.arange(start, stop, dtype=np.int32),
        is_visual=is_visual[:stop],
        item=item[:stop],
        frame=frame[:stop],
        tile_rows=tile_rows,
        memory=memory,
    )


def random_lines(rng: np.random.Generator) -> Lines:
    return Lines(
        pattern=str(rng.choice(PATTERNS)),  # type: ignore[arg-type]  # one of them
        sink=int(rng.integers(0, 6)),
        local=int(rng.integers(1, 12)),
        vertical=int(rng.integers(0, 6)),
        slash=int(rng.integers(0, 4)),
        vline=bool(rng.random() < 0.6),
        hline=bool(rng.random() < 0.5),
        same=bool(rng.random() < 0.4),
    )


def random_head(rng: np.random.Generator) -> Head:
    lines = [random_lines(rng) for _ in range(4)]
    return Head(
        boundary=str(rng.choice(BOUNDARIES)),  # type: ignore[arg-type]  # one of them
        vision=lines[0],
        text=lines[1],
        vision_to_text=lines[2],
        text_to_vision=lines[3],
    )


def random_found(rng: np.random.Generator, heads: Sequence[Head], view: ChunkView) -> dict[Group, Found]:
    """Any lines, as if they had been found."""
    found: dict[Group, Found] = {}
    slots = len(view.is_visual)
    for group in GROUPS:
        stride = rng.integers(0, 7, len(heads)) * (rng.random(len(heads)) < 0.7)
        first = rng.integers(0, 7, len(heads)) % np.maximum(stride, 1)
        each = found[group] = Found(slots, slots, stride, first)
        for at, head in enumerate(heads):
            parts = parts_of(head, group)
            for part, lines in enumerate((parts.first, parts.second)):
                if lines.pattern != "a_shape" and not (parts.is_joint and part):
                    keys, offsets = (
                        np.sort(rng.permutation(slots)[: int(rng.integers(0, 8))]).astype(np.int64)
                        for _ in range(2)
                    )
                    if lines.pattern == "grid" and (part or each.stride[at]):
                        offsets = offsets[:0]
                    each.picked[at, part] = Picked(keys, offsets[::-1].copy())
    return found


def expected_mask(view: ChunkView, heads: Sequence[Head], found: Mapping[Group, Found], block: int) -> Mask:
    """bool [Hq, n, S], key by key."""
    mask = np.zeros((len(heads), len(view.rows), len(view.is_visual)), np.bool_)
    for at, head in enumerate(heads):
        for rows, group in _tiles(view, at, head, found, block):
            for row in rows:
                for key in range(int(view.rows[row]) + 1):
                    seen = group is None or _is_seen(view, at, head, found[group], rows, group, key)
                    mask[at, row, key] = seen
    return mask


def _place(view: ChunkView, slot: int, group: Group) -> int:
    """How many keys of a group stand before a slot."""
    before = view.is_visual[:slot]
    return {"all": len(before), "vision": int(before.sum()), "text": int((~before).sum())}[group]


def _tiles(
    view: ChunkView, at: int, head: Head, found: Mapping[Group, Found], block: int
) -> Iterator[tuple[list[int], Group | None]]:
    """Rows of a head that see the same, and what group they are; None: they see everything."""
    is_split, few = head.boundary in ("q", "2d"), int((~view.is_visual[view.rows]).sum()) <= PROBED_ROWS
    counted: Group = "all" if head.boundary == "no" else "vision"
    groups: dict[Group, list[int]] = {"all": [], "vision": [], "text": []}
    for row, slot in enumerate(view.rows):
        groups[("vision" if view.is_visual[slot] else "text") if is_split else "all"].append(row)
    for group, rows in groups.items():
        parts = parts_of(head, group)
        looks = any(lines.pattern != "a_shape" for lines in (parts.first, parts.second))
        is_dense = set[int]()
        own = dict[int, list[int]]()
        for row in rows:
            slot = int(view.rows[row])
            place = _place(view, slot, counted)
            lines, stride, first = head.vision, int(found[group].stride[at]), found[group].first[at]
            is_counted = bool(view.is_visual[slot]) or counted == "all"
            if group == "text" or not is_counted or lines.pattern != "grid" or not stride:
                is_line = by_class = False
            else:
                is_line, by_class = lines.hline and place % stride == first, lines.same
            if is_line or (group == "text" and few and looks):
                is_dense.add(row)
            elif by_class:
                own.setdefault(place % stride, []).append(row)
        for row in sorted(is_dense):
            yield [row], None
        for together in own.values():
            for first in range(0, len(together), view.tile_rows):
                yield together[first : first + view.tile_rows], group
        classed = {row for together in own.values() for row in together}
        is_classed = group != "text" and head.vision.pattern == "grid" and head.vision.same
        whole = [row for row in rows if row not in is_dense | classed]
        # elsewhere dense rows leave gaps in the blocks
        whole = whole if is_classed and found[group].stride[at] else rows
        blocks = [whole[first : first + block] for first in range(0, len(whole), block)]
        for rows_of in blocks:
            left = [row for row in rows_of if row not in is_dense | classed]
            if left:
                yield left, group


def _is_seen(
    view: ChunkView, at: int, head: Head, each: Found, rows: list[int], group: Group, key: int
) -> bool:
    parts = parts_of(head, group)
    first, last = int(view.rows[rows[0]]), int(view.rows[rows[-1]])
    own: Group = "vision" if view.is_visual[key] else "text"
    keys: Group = "all" if parts.is_joint else own
    part = 0 if parts.is_joint or own == "vision" else 1
    lines = (parts.first, parts.second)[part]
    place = _place(view, key, keys)
    if place < lines.sink or place >= _place(view, first + 1, keys) - lines.local:
        return True
    if (at, part) in each.picked:
        picked = each.picked[at, part]
        if place in picked.keys.tolist():
            return True
        if group == "all" or keys in ("all", group):
            ends = [_place(view, slot + 1, keys) - 1 for slot in (first, last)]
            if any(ends[0] <= place + offset <= ends[1] for offset in picked.offsets.tolist()):
                return True
    counted: Group = "all" if head.boundary == "no" else "vision"
    stride = int(each.stride[at])
    if lines.pattern != "grid" or part or not stride or (counted == "vision" and own == "text"):
        return False
    residue = _place(view, key, counted) % stride
    if lines.vline and residue == each.first[at]:
        return True
    is_classed = view.is_visual[first] or counted == "all"
    return lines.same and bool(is_classed) and residue == _place(view, first, counted) % stride


def union_mask(index: AttentionIndex, view: ChunkView) -> Mask:
    """What an index says: bool [Hq, n, S] by slot."""
    heads, group = view.queries.shape[1], view.queries.shape[1] // view.keys.shape[1]
    mask = np.zeros((heads, len(view.rows), len(view.is_visual)), np.bool_)
    for tile in index.tiles.tolist():
        rows, keys = tile_rows_of(index, tile), tile_keys(index, tile)
        orders = key_orders(index, tile, keys, group)
        for row in rows.tolist():
            mask[tile[1], row, orders[orders <= int(view.rows[row])].numpy()] = True
    return mask
