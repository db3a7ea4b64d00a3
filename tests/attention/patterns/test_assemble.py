"""Lists become an index that says the same, whoever shares them and however rows are tiled."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.density import pairs_of
from mmserve.attention.patterns.assemble import (
    Lists,
    RowBlocks,
    assemble,
    from_blocks,
    joined,
    listed,
    row_blocks,
    runs_of_blocks,
    sink_and_band,
    stacked,
)
from mmserve.kernels.prefill_attention.index import tile_keys
from tests.attention.patterns.chunks import chunk, seen_by
from tests.attention.views import causal


def keys_of(lists: Lists, head: int, block: int, size: int = 1) -> list[int]:
    """The keys of one list, in its order; of runs where the values are runs."""
    begin, count = int(lists.begins[head, block]), int(lists.counts[head, block])
    found: list[int] = []
    for value in lists.values[begin : begin + count].tolist():
        found += (
            range(value[0], value[0] + value[1] * value[2], value[1]) if isinstance(value, list) else [value]
        )
    return found


def brute(view: ChunkView, rows: RowBlocks, blocks: Tensor, size: int) -> Tensor:
    """Which rows see which slots by a map of blocks [heads, row blocks, key blocks]."""
    heads = view.queries.shape[1]
    seen = torch.zeros(heads, len(view.rows), len(view.keys), dtype=torch.bool)
    for head in range(heads):
        of = blocks[head // (heads // len(blocks))]
        for row in range(len(view.rows)):
            block = row // rows.size
            own = range(int(rows.first[block]) // size, int(rows.last[block]) // size + 1)
            for key in range(len(view.keys)):
                seen[head, row, key] = key // size in own or bool(of[block, key // size])
    return seen & causal(view)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [8, 64])
def test_blocks_are_seen_as_the_map_says(size: int, seed: int) -> None:
    rng = random.Random(seed)
    slots = rng.randrange(1, 150)
    n = rng.randrange(1, slots + 1)
    dropped = rng.randrange(n)
    view = chunk(range(slots - n, slots - dropped), slots, tile_rows=rng.choice([4, 16, 64]), d=4)
    rows = row_blocks(view, rng.choice([8, 16, 20]))
    heads = rng.choice([1, 2, 4])
    blocks = torch.rand(heads, len(rows.first), -(-slots // size), generator=torch.manual_seed(seed)) < 0.3
    index = from_blocks(view, rows, blocks, block=size)
    assert torch.equal(seen_by(index, view), brute(view, rows, blocks, size))
    # the longest tiles are launched first
    lengths = [len(tile_keys(index, tile)) for tile in index.tiles.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert index.tile_rows <= min(view.tile_rows, rows.size)


def test_rows_in_blocks_keep_their_slots() -> None:
    rows = row_blocks(chunk([3, 4, 5, 9, 20], 30, d=4), 2)
    assert rows.first.tolist() == [3, 5, 20]
    assert rows.last.tolist() == [4, 9, 20]


def test_runs_of_blocks_join_neighbours() -> None:
    seen = torch.tensor([[[1, 1, 0, 1], [0, 0, 0, 0]], [[0, 0, 1, 1], [1, 1, 1, 1]]]).bool()
    runs = runs_of_blocks(seen, 4)
    assert runs.values.tolist() == [[0, 1, 8], [12, 1, 4], [8, 1, 8], [0, 1, 16]]
    assert keys_of(runs, 0, 0) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert keys_of(runs, 0, 1) == []
    assert keys_of(runs, 1, 1) == list(range(16))


@pytest.mark.parametrize("sink", [0, 3, 30])
def test_a_sink_and_a_band_name_no_key_twice(sink: int) -> None:
    view = chunk(20, 60, d=4)
    rows = row_blocks(view, 8)
    for begin in (0, 2, 3, 4, 35, 47):
        runs = sink_and_band(rows, sink, torch.full_like(rows.first, begin))
        for block, (first, last) in enumerate(zip(rows.first.tolist(), rows.last.tolist(), strict=True)):
            expected = {*range(min(sink, last + 1)), *range(min(begin, first), last + 1)}
            assert keys_of(runs, 0, block) == sorted(expected)
        seen_by(assemble(view, rows, runs=runs), view)


def test_lists_are_joined_and_stacked() -> None:
    one = listed(torch.tensor([[[1, 0], [1, 1]]]).bool(), torch.tensor([5, 6]))
    other = listed(torch.tensor([[[0, 1], [0, 0]], [[1, 1], [1, 0]]]).bool(), torch.tensor([7, 8]))
    both = joined(one, other)
    assert [[keys_of(both, head, block) for block in range(2)] for head in range(2)] == [
        [[5, 8], [5, 6]],
        [[5, 7, 8], [5, 6, 7]],
    ]
    pile = stacked([one, other])
    assert [[keys_of(pile, head, block) for block in range(2)] for head in range(3)] == [
        [[5], [5, 6]],
        [[8], []],
        [[7, 8], [7]],
    ]


def test_columns_may_be_wider_than_their_count() -> None:
    view = chunk(4, 12, kv_heads=1, group=2, d=4)
    rows = row_blocks(view, 2)
    padded = Lists(torch.tensor([1, 2, -9, 3, -9, -9]).int(), torch.tensor([[0, 3]]), torch.tensor([[2, 1]]))
    index = assemble(view, rows, runs=sink_and_band(rows, 0, rows.first), columns=padded)
    seen = seen_by(index, view)
    assert [row.nonzero().flatten().tolist() for row in seen[1]] == [
        [1, 2, 8],
        [1, 2, 8, 9],
        [3, 10],
        [3, 10, 11],
    ]
    assert tuple(int(each) for each in pairs_of(index)) == (2 * 2 * (4 + 3), 2 * 2 * (10 + 12))
