"""HiP: chunks of keys are judged by one key each, found by bisection; the best are split, again and again.

Knows nothing about pages or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import ALL, local_slots, sink_slots
from mmserve.attention.patterns.assemble import assemble, joined, row_blocks, runs_of_blocks, sink_and_band
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole


class Stage(NamedTuple):
    """One round of the search."""

    chunk: int  # size of its chunks, in units of the setting `chunk`
    kept: int  # how many keys survive it, in units of the setting `keys`
    stride: int  # neighbouring rows that are averaged into one query


# as published: chunks of 256, 32 and 8 keys, of which 32768, 8192 and 2048 keys survive
STAGES = (Stage(32, 16, 4), Stage(4, 4, 4), Stage(1, 1, 1))
# blocks of rows that are searched for at once: what bounds the memory
SLICE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HiP(AttentionPattern):
    """Of the keys between sink and local band, those `keys` that a tree search over chunks finds.

    InfiniteHiP's three stages. A chunk is bisected down to one key: each half is judged by its middle key, by
    the largest product with any query of the block; the largest on the way is the chunk's score. The best
    chunks go on, cut into smaller ones. Here all query heads of a KV head share what is found, as they share
    its keys. A chunk of a prompt searches all slots so far. The paper's dense first layers are a rule of the
    executor.
    """

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.08910"

    keys: int = whole(2048, 1, ALL, "how many keys are found for each block of rows")
    chunk: int = whole(8, 1, 1024, "slots of the smallest chunks that are searched")
    sink: int = sink_slots(256)
    local: int = local_slots(1024)
    rows: int = whole(64, 1, 1024, "rows that are searched for together")

    @classmethod
    def everything(cls) -> Self:
        return cls(keys=ALL)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.rows)
        sink = -(-min(self.sink, len(view.keys)) // self.chunk) * self.chunk
        # candidates are whole chunks behind the sink; the band takes what is left over
        ahead = (rows.first - self.local + 1 - sink).clamp(min=0)
        stop = sink + ahead // self.chunk * self.chunk
        band = sink_and_band(rows, sink, stop)
        chunks = (int(stop.max()) - sink) // self.chunk
        if chunks == 0:
            return assemble(view, rows, runs=band)
        keys = view.keys.transpose(0, 1)  # [kv_heads, S, d]
        queries = self._queries(view, len(stop))
        found = [
            self._search(queries[:, at : at + SLICE], keys, sink, stop[at : at + SLICE], chunks)
            for at in range(0, len(stop), SLICE)
        ]
        seen = functional.pad(torch.cat(found, 1), (sink // self.chunk, 0))
        return assemble(view, rows, runs=joined(runs_of_blocks(seen, self.chunk), band))

    def _queries(self, view: ChunkView, blocks: int) -> Tensor:
        """Queries of each block of rows, fp32 [kv_heads, blocks, rows, group, d]."""
        # the last row fills the last block up
        row = torch.arange(blocks * self.rows, device=view.queries.device).clamp(max=len(view.rows) - 1)
        queries = view.queries[row].float().unflatten(0, (blocks, -1)).unflatten(2, (view.keys.shape[1], -1))
        found: Tensor = queries.permute(2, 0, 1, 3, 4)
        return found

    def _search(self, queries: Tensor, keys: Tensor, sink: int, stop: Tensor, chunks: int) -> Tensor:
        """Which of the smallest chunks behind the sink are found, bool [kv_heads, blocks, chunks].

        Blocks have candidates up to `stop`, int64 [blocks].
        """
        size = STAGES[0].chunk * self.chunk
        start = torch.arange(sink, sink + chunks * self.chunk, size, device=stop.device)
        start = start.expand(len(keys), len(stop), -1)
        for stage in STAGES:
            parts, size = size // (stage.chunk * self.chunk), stage.chunk * self.chunk
            start = (start[..., None] + size * torch.arange(parts, device=stop.device)).flatten(2)
            end = torch.maximum(torch.minimum(start + size, stop[:, None]), start)
            pooled = _averaged(queries, stage.stride).to(keys.dtype)
            score = _chunk_scores(pooled, keys, start, end, size)
            best = score.topk(min(score.shape[2], max(1, self.keys * stage.kept // size)), sorted=False)
            # where there is no candidate any more, a place behind all slots
            start = start.gather(2, best.indices).masked_fill(best.values == -torch.inf, ALL)
        seen = torch.zeros(len(keys), len(stop), chunks + 1, dtype=torch.bool, device=stop.device)
        seen.scatter_(2, ((start - sink) // self.chunk).clamp(max=chunks), True)
        return seen[..., :chunks]


def _averaged(queries: Tensor, stride: int) -> Tensor:
    """Means of every `stride` rows: [kv_heads, blocks, queries, d]."""
    means = [rows.mean(2) for rows in queries.split(stride, 2)]
    return torch.stack(means, 2).flatten(2, 3)


def _chunk_scores(queries: Tensor, keys: Tensor, start: Tensor, end: Tensor, size: int) -> Tensor:
    """Score of each chunk [start, end) of at most `size` keys, -inf where it is empty; all as `start`."""
    score = torch.full(start.shape, -torch.inf, dtype=keys.dtype, device=keys.device)
    is_chunk, count = start < end, start.shape[2]
    heads = torch.arange(len(keys), device=keys.device)[:, None, None]
    # a chunk of one key is judged too
    for _ in range(max(1, (size - 1).bit_length())):
        middle = (start + end) // 2
        judged = torch.cat([(start + middle) // 2, (middle + end) // 2], 2).clamp(max=keys.shape[1] - 1)
        both = (queries @ keys[heads, judged].transpose(2, 3)).amax(2)
        left, right = both[..., :count], both[..., count:]
        start, end = torch.where(left > right, start, middle), torch.where(left > right, middle, end)
        score = torch.maximum(score, torch.maximum(left, right))
    return score.masked_fill(~is_chunk, -torch.inf)
