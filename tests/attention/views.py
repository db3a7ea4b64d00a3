"""Made-up prompts in front of a pattern, and what a pattern's index means, one row at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView, PatternMemory, Skipping
from mmserve.attention.sparse import SlotKinds
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import check_index, key_orders, tile_keys, tile_rows_of

# text, videos as frames x tokens (with the newline that ends them), images
LAYOUTS = {
    "video": "t9 v12x16",
    "text in front of everything": "t70 v5x20 t3 v9x7",
    "images between": "t4 i33 t2 i50 t17 v6x16 i21",
    "fragments": "i7 t1 i5 t1 v2x9 t2 v3x4 t1 i11 t40 v7x13",
    "one item from the start": "v20x16",
}


def kinds(spec: str) -> SlotKinds:
    """Slots of a prompt such as "t9 v12x16 i50"."""
    item, frame, items, frames = list[int](), list[int](), 0, 0
    for part in spec.split():
        if part[0] == "t":
            item += [-1] * int(part[1:])
            frame += [-1] * int(part[1:])
            continue
        count, tokens = map(int, part[1:].split("x")) if part[0] == "v" else (1, int(part[1:]))
        numbers = np.repeat(np.arange(frames, frames + count), tokens).tolist()
        # a newline ends a video
        numbers += [numbers[-1]] * (part[0] == "v")
        item += [items] * len(numbers)
        frame += numbers
        items, frames = items + 1, frames + count
    found = np.array(item, np.int32), np.array(frame, np.int32)
    return SlotKinds(found[0] >= 0, *found)


def view(
    of: SlotKinds,
    rows: range | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    tile_rows: int = 32,
    layer: int = 3,
    layers: int = 8,
    seed: int = 0,
    memory: PatternMemory | None = None,
) -> ChunkView:
    """Rows of a prompt whose queries, keys and values depend on nothing but their slots and the seed."""
    generator = torch.Generator().manual_seed(seed)
    slots = len(of.item)
    q, k, v = (
        torch.randn(4096, count, width, generator=generator)[:slots]
        for count in (heads[0], heads[1], heads[1])
    )
    rows = range(slots) if rows is None else rows
    seen = rows.stop
    return ChunkView(
        layer=layer,
        layers=layers,
        queries=q[rows.start : rows.stop],
        keys=k[:seen],
        values=v[:seen],
        rows=np.arange(rows.start, rows.stop, dtype=np.int32),
        is_visual=of.is_visual[:seen],
        item=of.item[:seen],
        frame=of.frame[:seen],
        tile_rows=tile_rows,
        memory=memory,
    )


def index_of(found: AttentionIndex | Skipping | None) -> AttentionIndex | None:
    return found.index if isinstance(found, Skipping) else found


def checked(index: AttentionIndex, of: ChunkView) -> Tensor:
    """Which slots each row sees, bool [q_heads, n, S], of an index that keeps its promises."""
    n, heads, kv_heads, slots = len(of.rows), of.queries.shape[1], of.keys.shape[1], len(of.keys)
    assert index.row_order.tolist() == of.rows.tolist()
    assert index.key_begin.tolist() == [[0] * kv_heads]
    assert index.tile_rows <= of.tile_rows
    check_index(index, torch.full((1, kv_heads), slots), q_heads=heads)
    mask = torch.zeros(heads, n, slots, dtype=torch.bool)
    written = torch.zeros(heads, n, dtype=torch.int64)
    for tile in index.tiles.tolist():
        rows, keys = tile_rows_of(index, tile), tile_keys(index, tile)
        order = key_orders(index, tile, keys, heads // kv_heads).long()
        mask[tile[1], rows[:, None], order] = order <= index.row_order[rows].long()[:, None]
        written[tile[1], rows] += 1
    assert (written == 1).all(), "every row of every head is in a tile"
    return mask


def causal(of: ChunkView) -> Tensor:
    """bool [n, S]."""
    return torch.arange(len(of.keys)) <= torch.from_numpy(of.rows).long()[:, None]


def attend(of: ChunkView, mask: Tensor) -> Tensor:
    """Attention [n, q_heads, d] in fp64, where each head's rows see what the mask [q_heads, n, S] says."""
    group = of.queries.shape[1] // of.keys.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (of.queries, of.keys, of.values))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * of.scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)
