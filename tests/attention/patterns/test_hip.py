"""HiP's tree search, chunk by chunk and key by key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.hip import STAGES, HiP
from tests.attention.patterns.chunks import blocks_of, chunk, seen_by
from tests.attention.views import causal


def chunk_score(queries: Tensor, keys: Tensor, start: int, stop: int, size: int) -> float:
    """Bisect one chunk; as many steps as a chunk of that size takes."""
    best = -torch.inf
    for _ in range(max(1, (size - 1).bit_length())):
        middle = (start + stop) // 2
        left, right = (
            float((queries @ keys[min(at, len(keys) - 1)]).max())
            for at in ((start + middle) // 2, (middle + stop) // 2)
        )
        best = max(best, left, right)
        start, stop = (start, middle) if left > right else (middle, stop)
    return best


def found_by(pattern: HiP, queries: Tensor, keys: Tensor, sink: int, limit: int) -> list[tuple[int, int]]:
    """Stretches of keys of one block of rows, queries [rows, group, d], in one KV head."""
    size = STAGES[0].chunk * pattern.chunk
    starts = list(range(sink, limit, size))
    for stage in STAGES:
        cut = stage.chunk * pattern.chunk
        starts = [at for start in starts for at in range(start, start + size, cut) if at < limit]
        size = cut
        pooled = torch.stack([part.mean(0) for part in queries.split(stage.stride)]).flatten(0, 1)
        scored = [(chunk_score(pooled, keys, at, min(at + size, limit), size), at) for at in starts]
        kept = max(1, pattern.keys * stage.kept // size)
        starts = [at for _, at in sorted(scored, reverse=True)[:kept]]
    return [(at, min(at + size, limit)) for at in starts]


def expected(pattern: HiP, view: ChunkView) -> Tensor:
    kv_heads = view.keys.shape[1]
    group = view.queries.shape[1] // kv_heads
    seen = torch.zeros(view.queries.shape[1], len(view.rows), len(view.keys), dtype=torch.bool)
    sink = -(-min(pattern.sink, len(view.keys)) // pattern.chunk) * pattern.chunk
    for block in blocks_of(len(view.rows), pattern.rows):
        first = int(view.rows[block.start])
        limit = sink + max(0, first - pattern.local + 1 - sink) // pattern.chunk * pattern.chunk
        queries = view.queries[block].float()
        # the last block of rows is filled up with its last row
        queries = torch.cat([queries, queries[-1:].expand(pattern.rows - len(queries), -1, -1)])
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            seen[heads, block, :sink] = seen[heads, block, limit:] = True
            for start, stop in found_by(pattern, queries[:, heads], view.keys[:, head].float(), sink, limit):
                seen[heads, block, start:stop] = True
    return seen & causal(view)


@pytest.mark.parametrize(
    ("pattern", "rows", "slots"),
    [
        (HiP(keys=64, chunk=8, sink=16, local=32, rows=64), 128, 900),
        (HiP(keys=16, chunk=2, sink=5, local=20, rows=16), 50, 400),
        (HiP(keys=24, chunk=4, sink=0, local=1, rows=12), 30, 530),
        (HiP(keys=10, chunk=1, sink=3, local=7, rows=10), 45, 310),
    ],
)
def test_rows_see_what_the_search_finds(pattern: HiP, rows: int, slots: int) -> None:
    view = chunk(rows, slots, group=3)
    assert torch.equal(seen_by(pattern.index(view), view), expected(pattern, view))


def test_a_needle_is_found_where_keys_around_it_are_like_it() -> None:
    view = chunk(64, 3000, spread=1.0)
    view.queries[:] = view.queries[:, ::2].mean(0).repeat_interleave(2, 0)
    view.keys[1200:1264] = 50 * view.queries[0, ::2]
    seen = seen_by(HiP(keys=64, chunk=8, sink=16, local=64).index(view), view)
    assert seen[:, :, 1200:1264].float().mean() > 0.85
    assert seen.float().mean() < 0.12


def test_memory_is_bounded_by_slices_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    view, pattern = chunk(100, 600), HiP(keys=32, chunk=2, sink=4, local=16, rows=16)
    whole = seen_by(pattern.index(view), view)
    monkeypatch.setattr("mmserve.attention.patterns.hip.SLICE", 2)
    assert torch.equal(seen_by(pattern.index(view), view), whole)
