"""InfLLM-v2's choice of blocks, mean by mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.infllm_v2 import InfLLMv2
from tests.attention.patterns.chunks import blocks_of, chunk, seen_by
from tests.attention.views import causal


def block_scores(pattern: InfLLMv2, view: ChunkView, head: int, rows: slice) -> list[float]:
    """Of each block of keys, for one block of rows and a KV head's query heads."""
    group = view.queries.shape[1] // view.keys.shape[1]
    starts = range(0, len(view.keys) - pattern.kernel + 1, pattern.stride)
    total = torch.zeros(len(starts), dtype=torch.float64)
    for row in range(rows.start, rows.stop):
        ended = [at for at in starts if at + pattern.kernel - 1 <= view.rows[row]]
        if not ended:
            continue
        means = torch.stack([view.keys[at : at + pattern.kernel, head].double().mean(0) for at in ended])
        queries = view.queries[row, head * group : (head + 1) * group].double()
        total[: len(ended)] += torch.softmax(queries @ means.T * view.scale, -1).sum(0)
    scores = []
    for block in blocks_of(len(view.keys), pattern.block):
        low, high = block.start, block.start + pattern.block
        touching = [float(total[i]) for i, at in enumerate(starts) if at < high and at + pattern.kernel > low]
        scores.append(max(touching, default=0.0))
    return scores


def expected(pattern: InfLLMv2, view: ChunkView) -> Tensor:
    kv_heads = view.keys.shape[1]
    group = view.queries.shape[1] // kv_heads
    seen = torch.zeros(view.queries.shape[1], len(view.rows), len(view.keys), dtype=torch.bool)
    for rows in blocks_of(len(view.rows), pattern.rows):
        own = int(view.rows[rows.start]) // pattern.block
        for head in range(kv_heads):
            scores = block_scores(pattern, view, head, rows)
            for block in range(own + 1):
                if block < pattern.sink or own - block <= pattern.local // pattern.block:
                    scores[block] = torch.inf
            best = sorted(range(own + 1), key=lambda block: (-scores[block], block))[: pattern.topk]
            for block in {*best, own}:
                # the last rows of a block may already be in the next one
                stop = (block + 1) * pattern.block if block < own else len(view.keys)
                seen[head * group : (head + 1) * group, rows, block * pattern.block : stop] = True
    return seen & causal(view)


@pytest.mark.parametrize(
    ("pattern", "rows", "slots"),
    [
        (InfLLMv2(topk=5, local=64, rows=64), 128, 900),
        (InfLLMv2(kernel=8, stride=4, block=16, topk=7, local=32, rows=16), 50, 333),
        (InfLLMv2(kernel=9, stride=4, block=16, topk=4, sink=0, local=0, rows=10), 45, 210),
        (InfLLMv2(kernel=4, stride=4, block=8, topk=6, sink=2, local=16, rows=8), 90, 90),
    ],
)
def test_blocks_are_chosen_by_overlapping_means(pattern: InfLLMv2, rows: int, slots: int) -> None:
    view = chunk(rows, slots, group=3)
    assert torch.equal(seen_by(pattern.index(view), view), expected(pattern, view))


def test_fewer_slots_than_a_mean_has_are_seen_by_place() -> None:
    view = chunk(9, 20)
    seen = seen_by(InfLLMv2(topk=1).index(view), view)
    assert torch.equal(seen, causal(view).expand_as(seen))
