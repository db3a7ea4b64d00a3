"""InfLLM-v2: blocks of keys chosen by overlapping means of keys. Knows nothing about pages or models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import ALL
from mmserve.attention.patterns.assemble import RowBlocks, from_blocks, row_blocks, row_order
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.base import check_count
from mmserve.pruning.settings import check_values, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLMv2(AttentionPattern):
    """Each block of rows sees `topk` blocks of keys, the first ones and the local ones among them.

    A row weighs the means of every `kernel` keys, `stride` apart, by a softmax over those that end before it,
    summed over the query heads of a KV head. A block of keys counts as much as the largest of the means that
    touch it. The paper chooses for each row; here a block of rows chooses together, by the sum of its rows'
    weights, since a tile of one row would use no product. Its models are trained with this (5 B tokens);
    others lose accuracy. The paper's dense_len is `attention_dense_below`.
    """

    name: ClassVar[str] = "infllm_v2"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24663"
    trained_weights: ClassVar[bool] = True

    kernel: int = whole(32, 1, 4096, "keys of a mean")
    stride: int = whole(16, 1, 4096, "how far apart means begin")
    block: int = whole(64, 1, 65536, "slots of a block of keys")
    topk: int = whole(64, 1, ALL, "how many blocks of keys a block of rows sees")
    sink: int = whole(1, 0, ALL, "how many of the first blocks every row sees")
    local: int = whole(2048, 0, ALL, "how many of the latest slots every row sees")
    rows: int = whole(64, 1, 1024, "rows that choose together")

    def __post_init__(self) -> None:
        check_values(self)
        check_count("stride", self.stride, 1, self.kernel)
        check_count("block", self.block, self.stride, 65536)
        if self.block % self.stride:
            raise BadRequest(f"Expected block to be a multiple of stride {self.stride}, but got {self.block}")

    @classmethod
    def everything(cls) -> Self:
        return cls(topk=ALL)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.rows)
        blocks = -(-len(view.keys) // self.block)
        own, key_block = rows.first // self.block, torch.arange(blocks, device=rows.first.device)
        distance = own[:, None] - key_block
        is_fixed = (key_block < self.sink) | (distance <= self.local // self.block)
        score = self._block_scores(view, rows, blocks).masked_fill(is_fixed, torch.inf)
        # what lies behind the row's own block is not chosen
        score = score.masked_fill(distance < 0, -torch.inf)
        # a mean that touches two blocks makes them equal: the earlier one first
        best = score.argsort(dim=-1, descending=True, stable=True)[..., : self.topk]
        chosen = score.gather(2, best) > -torch.inf
        seen = torch.zeros_like(score, dtype=torch.bool).scatter_(2, best, chosen)
        return from_blocks(view, rows, seen, block=self.block)

    def _block_scores(self, view: ChunkView, rows: RowBlocks, blocks: int) -> Tensor:
        """Weight of each block of keys with each block of rows, fp32 [kv_heads, row blocks, blocks]."""
        order, pad = row_order(view), -len(view.rows) % rows.size
        heads = []
        for queries, keys in zip(
            view.queries.unflatten(1, (view.keys.shape[1], -1)).unbind(1), view.keys.unbind(1), strict=True
        ):
            if len(keys) < self.kernel:
                heads.append(torch.zeros(len(rows.first), blocks, device=keys.device))
                continue
            means = keys.float().unfold(0, self.kernel, self.stride).mean(-1)
            weights = self._weights(queries * view.scale, means.to(keys.dtype), order)
            weights = functional.pad(weights, (0, 0, 0, pad)) if pad else weights
            summed = weights.unflatten(1, (-1, rows.size)).sum((0, 2))
            heads.append(self._pooled(summed, blocks))
        return torch.stack(heads)

    def _weights(self, queries: Tensor, means: Tensor, order: Tensor) -> Tensor:
        """Of scaled queries [n, group, d] over the means that end before their row, [group, n, means]."""
        scores = queries.transpose(0, 1) @ means.T
        ends = torch.arange(len(means), device=means.device) * self.stride + self.kernel - 1
        # all rows see the first ones
        begin = torch.searchsorted(ends, order[0].long(), right=True)
        scores[..., begin:].masked_fill_(ends[begin:] > order[:, None], -torch.inf)
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        # a row before the end of the first mean has weights of nan
        return weights.nan_to_num_(0.0) if order[0] < self.kernel - 1 else weights

    def _pooled(self, weights: Tensor, blocks: int) -> Tensor:
        """The largest weight of a mean that touches each block; weights are [row blocks, means]."""
        before = (self.kernel - 1) // self.stride  # means that begin before a block and reach into it
        step = self.block // self.stride
        after = blocks * step - weights.shape[1]
        padded = functional.pad(weights, (before, after))
        return functional.max_pool1d(padded[None], before + step, step)[0]
