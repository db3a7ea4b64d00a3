"""Batches of random tiles with the plainest rule of who sees whom, for every kernel that takes an index."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mmserve.kernels.merge_lse.naive import Partial
from mmserve.kernels.prefill_attention.index import AttentionIndex, Tile, dense_index, pack_tiles

KV_HEADS = 2
PAGE_SIZE = 8
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A batch, the index of its attention, and which rows see which keys by the plainest rule."""

    index: AttentionIndex
    key_lengths: list[int]
    visible: list[Tensor]  # per sequence, bool [Hq, rows, keys]
    row_counts: list[int]


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_keys(rng: random.Random, length: int, needed: set[int]) -> Tile:
    """Disjoint runs, whole blocks and columns that hold `needed` among others; rows are set by the caller."""
    free = set(range(length))
    runs: list[tuple[int, int, int]] = []
    blocks: list[int] = []
    for _ in range(rng.randrange(4)):
        start, stride = rng.randrange(length), rng.choice([1, 1, 2, 5])
        run = range(start, length, stride)[: rng.randrange(1, length + 1)]
        if free >= set(run):
            runs.append((start, stride, len(run)))
            free -= set(run)
    for block in range(length // BLOCK):
        keys = set(range(block * BLOCK, (block + 1) * BLOCK))
        if rng.random() < 0.4 and free >= keys:
            blocks.append(block)
            free -= keys
    columns = [key for key in free if key in needed or rng.random() < 0.2]
    rng.shuffle(columns)
    return Tile(0, 0, (), runs, blocks, columns)


def random_case(seed: int, *, group: int, permuted: bool, tile_rows: int = 16) -> Case:
    """Two sequences, the second behind a cached prefix; rows and keys in random tiles, each row in one."""
    rng = random.Random(seed)
    row_counts, older = [rng.randrange(1, 24), rng.randrange(1, 24)], [0, rng.randrange(1, 20)]
    key_lengths = [rows + old for rows, old in zip(row_counts, older, strict=True)]
    orders = [torch.randperm(keys, generator=torch.Generator().manual_seed(seed)) for keys in key_lengths]
    if not permuted:
        orders = [torch.arange(keys) for keys in key_lengths]
    tiles, visible, packed = [], [], 0
    for sequence, (rows, keys, order) in enumerate(zip(row_counts, key_lengths, orders, strict=True)):
        place = {int(value): at for at, value in enumerate(order)}
        seen = torch.zeros(KV_HEADS * group, rows, keys, dtype=torch.bool)
        for head in range(KV_HEADS * group):
            left = rng.sample(range(rows), rows)
            while left:
                count = rng.randrange(1, tile_rows + 1)
                chosen, left = left[:count], left[count:]
                row_order = torch.tensor(chosen) + keys - rows
                tile = random_keys(rng, keys, {place[int(own)] for own in row_order})
                tiles.append(tile._replace(sequence=sequence, head=head, rows=[packed + r for r in chosen]))
                axis = torch.zeros(keys, dtype=torch.bool)
                for start, stride, length in tile.runs:
                    axis[start : start + stride * length : stride] = True
                for block in tile.blocks:
                    axis[block * BLOCK : (block + 1) * BLOCK] = True
                axis[list(tile.columns)] = True
                seen[head, chosen] = axis & (order <= row_order[:, None])
        visible.append(seen)
        packed += rows
    begins = torch.tensor([0, key_lengths[0]])
    row_order = torch.cat([torch.arange(k - r, k) for r, k in zip(row_counts, key_lengths, strict=True)])
    index = pack_tiles(
        tiles,
        row_order=row_order.int(),
        key_begin=begins[:, None].repeat(1, KV_HEADS),
        tile_rows=tile_rows,
        block_size=BLOCK,
        key_order=torch.cat(orders).int() if permuted else None,
    )
    return Case(index, key_lengths, visible, row_counts)


def union_attention(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float) -> Partial:
    """Dense attention in fp64 under the mask of a case; k and v are on the axis."""
    outs, lses, at, axis = [], [], 0, 0
    group = q.shape[1] // KV_HEADS
    for seen, rows, keys in zip(case.visible, case.row_counts, case.key_lengths, strict=True):
        queries = q[at : at + rows].double().transpose(0, 1)
        own_k, own_v = (
            kv[axis : axis + keys].double().repeat_interleave(group, 1).transpose(0, 1) for kv in (k, v)
        )
        scores = (queries @ own_k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        outs.append((torch.softmax(scores, -1) @ own_v).transpose(0, 1))
        lses.append(torch.logsumexp(scores, -1).T)
        at, axis = at + rows, axis + keys
    return Partial(torch.cat(outs).float(), torch.cat(lses).float())


def paginate(kv: Tensor, case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """K or V of the axis in pages of random order, nan where no key is, and the tables."""
    max_pages = -(-max(case.key_lengths) // PAGE_SIZE)
    count = len(case.key_lengths) * KV_HEADS * max_pages
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tables = order.int().view(len(case.key_lengths), KV_HEADS, max_pages)
    pages = torch.full((count, PAGE_SIZE, kv.shape[2]), torch.nan, dtype=kv.dtype)
    axis = 0
    for sequence, keys in enumerate(case.key_lengths):
        slots = torch.arange(keys)
        for head in range(KV_HEADS):
            page = tables[sequence, head, slots // PAGE_SIZE].long()
            pages[page, slots % PAGE_SIZE] = kv[axis : axis + keys, head]
        axis += keys
    return pages, tables


def batch(case: Case, group: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q = uniform(sum(case.row_counts), KV_HEADS * group, d, seed=0).to(dtype)
    k, v = (uniform(sum(case.key_lengths), KV_HEADS, d, seed=seed).to(dtype) for seed in (1, 2))
    return q, k, v


def assert_same(found: Partial, expected: Partial, tolerance: float) -> None:
    torch.testing.assert_close(found.out.float(), expected.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=tolerance, rtol=0)


def poisoned(q: Tensor) -> Partial:
    """Memory that a kernel forgets to write shows."""
    return Partial(torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan))


def causal_case(row_counts: list[int], key_lengths: list[int], group: int, tile_rows: int) -> Case:
    index = dense_index(
        row_counts, key_lengths, q_heads=KV_HEADS * group, kv_heads=KV_HEADS, tile_rows=tile_rows
    )
    visible = [
        (torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]).expand(KV_HEADS * group, -1, -1)
        for rows, keys in zip(row_counts, key_lengths, strict=True)
    ]
    return Case(index, key_lengths, visible, row_counts)
