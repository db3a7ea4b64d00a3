"""SpargeAttn (arXiv 2502.18137, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView, Skipping
from mmserve.attention.patterns.assemble import from_blocks, row_blocks
from mmserve.attention.patterns.scores import block_scores, block_size
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparge(AttentionPattern):
    """Blocks whose rows are alike are judged by their means, all others are seen.

    First stage: a block of rows or keys is alike if the mean cosine of its pairs
    is above `similarity`. A block of rows sees, of the keys that are alike, the largest weights of
    softmax(mean(Q) mean(K)^T / sqrt(d)) whose sum is at most `cumulative`, at least one; keys that are not
    alike it sees always, rows that are not alike see everything. From the keys the mean of all is taken
    before, which the softmax does not see but the cosine does. Second stage: while attention runs, a step
    that adds at most the share `skip` of a row's largest weight is left out, on kernels that can. What
    differs: the mean key is that of the slots so far; a block of rows always sees its own keys; keys of 8
    bits are another matter. The defaults are those of the authors' code; their `skip` is exp(-50).
    """

    name: ClassVar[str] = "sparge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.18137"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    similarity: float = number(0.6, -1, 1, "the mean cosine from which on a block is judged")
    cumulative: float = number(0.98, 0, 1, "the share of the weights of means that is seen")
    skip: float = number(1.9e-22, 0, 0.99, "weights up to this share of the largest may be skipped")
    rows: int = block_size(128, "rows of a block")
    keys: int = block_size(64, "keys of a block")

    @classmethod
    def everything(cls) -> Self:
        return cls(cumulative=1.0, skip=0.0)

    def index(self, view: ChunkView) -> AttentionIndex | Skipping:
        index = from_blocks(view, row_blocks(view, self.rows), self._seen(view), block=self.keys)
        return Skipping(index, self.skip) if self.skip else index

    def _seen(self, view: ChunkView) -> Tensor:
        scores = block_scores(view, self.rows, self.keys)
        if self.cumulative == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        group = view.queries.shape[1] // view.keys.shape[1]
        keys = view.keys.float()
        alike = (_cosine(keys - keys.mean(0), self.keys) > self.similarity).repeat_interleave(group, 0)
        # nothing is known where no keys are alike
        weights = torch.softmax(scores.masked_fill(~alike[:, None], -torch.inf), -1).nan_to_num(0.0)
        order = weights.argsort(dim=-1, descending=True, stable=True)
        kept = weights.gather(-1, order).cumsum(-1) <= self.cumulative
        kept[..., 0] = True
        seen = torch.zeros_like(kept).scatter_(-1, order, kept)
        return seen | ~alike[:, None] | ~(_cosine(view.queries, self.rows) > self.similarity)[..., None]


def _cosine(x: Tensor, block: int) -> Tensor:
    """The mean cosine of all pairs of rows of each block of x [N, H, d]: fp32 [H, blocks]."""
    unit = functional.normalize(x.float(), dim=-1)
    sums = functional.pad(unit, (0, 0, 0, 0, 0, -len(x) % block)).unflatten(0, (-1, block)).sum(1)
    rows = torch.full((len(sums),), block, device=x.device)
    rows[-1] = len(x) - block * (len(sums) - 1)
    mean: Tensor = sums.square().sum(-1) / rows[:, None].square()
    return mean.T
