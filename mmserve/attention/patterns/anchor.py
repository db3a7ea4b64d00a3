"""AnchorAttention (arXiv 2505.23520, algorithms 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import (
    Lists,
    assemble,
    listed,
    row_blocks,
    row_order,
    sink_and_band,
)
from mmserve.attention.patterns.scores import block_size, products
from mmserve.kernels.pattern_index.naive import pool_rows
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorAttention(AttentionPattern):
    """Single keys whose score comes within `theta` of what rows find in the first block and near themselves.

    Algorithm 1: a row's anchor is its largest score among the first block of keys and those from its group
    on; a group is `step` blocks of rows. Algorithm 2: a key between them is seen by the whole group if for
    one of its blocks the mean query's score is at least the mean anchor less `theta`. Algorithm 3: rows see
    the first block, their group up to themselves, and those keys. What differs: groups are counted from the
    chunk's first row; the anchors serve the choice alone, where the authors keep the attention they found
    on the way.
    """

    name: ClassVar[str] = "anchor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23520"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    theta: float = number(12.0, 0, 1e9, "how far below the anchor a score may lie")
    step: int = whole(16, 1, 1024, "blocks of rows that share their keys")
    block: int = block_size(128, "rows of a block, and keys that are always seen")

    @classmethod
    def everything(cls) -> Self:
        return cls(theta=1e9)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.block)
        begin = rows.first[:: self.step].repeat_interleave(self.step)[: len(rows.first)]
        starts = range(0, len(view.rows), self.block * self.step)
        seen = torch.stack([self._chosen(view, start) for start in starts], 1)
        columns = listed(seen, torch.arange(seen.shape[2], device=seen.device))
        # the blocks of a group share its list
        by_block = (at.repeat_interleave(self.step, 1)[:, : len(begin)] for at in columns[1:])
        runs = sink_and_band(rows, self.block, begin)
        return assemble(view, rows, runs=runs, columns=Lists(columns.values, *by_block))

    def _chosen(self, view: ChunkView, start: int) -> Tensor:
        """The keys that the group of a row sees between the first block and its own: bool [Hq, slots]."""
        stop = min(start + self.block * self.step, len(view.rows))
        first = int(view.rows[start])
        seen = torch.zeros(
            view.queries.shape[1], len(view.keys), dtype=torch.bool, device=view.queries.device
        )
        if first <= self.block:
            return seen
        anchors = torch.stack(
            [
                _anchors(view, at, min(at + self.block, stop), first, self.block)
                for at in range(start, stop, self.block)
            ],
            1,
        )
        mean = pool_rows(view.queries[start:stop], self.block).to(view.queries.dtype)
        scores = products(mean, view.keys[self.block : first]) * view.scale
        seen[:, self.block : first] = (scores >= anchors[..., None] - self.theta).any(1)
        return seen


def _anchors(view: ChunkView, start: int, stop: int, first: int, sink: int) -> Tensor:
    """The mean over rows start to stop of their largest score near both ends of what they see: fp32 [Hq]."""
    queries, order = view.queries[start:stop], row_order(view)[start:stop]
    own = torch.arange(first, int(view.rows[stop - 1]) + 1, device=order.device)
    near = products(queries, view.keys[first : first + len(own)])
    near = near.masked_fill(own > order[:, None], -torch.inf).amax(-1)
    largest = torch.maximum(products(queries, view.keys[:sink]).amax(-1), near)
    return largest.float().mean(-1) * view.scale
