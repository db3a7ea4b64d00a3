"""MInference's block-sparse heads (arXiv 2407.02490, section 3.2 and algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import from_blocks, row_blocks
from mmserve.attention.patterns.scores import block_scores, block_size, largest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole

MAX_BLOCKS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSparse(AttentionPattern):
    """A block of rows sees the `blocks` blocks of keys with the largest product of means, and its own.

    Algorithm 2: scores are softmax(mean(Q) mean(K)^T / sqrt(d)), of which the top k of each row of blocks are
    taken; the softmax does not change which. What differs: blocks of rows are counted from the chunk's
    first row, so that its own keys may begin inside a block, which it then sees too.
    """

    name: ClassVar[str] = "block_sparse"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02490"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    blocks: int = whole(100, 1, MAX_BLOCKS, "how many blocks of keys a block of rows sees")
    block: int = block_size(64, "rows and keys of a block")

    @classmethod
    def everything(cls) -> Self:
        return cls(blocks=MAX_BLOCKS)

    def index(self, view: ChunkView) -> AttentionIndex:
        scores = block_scores(view, self.block, self.block)
        return from_blocks(view, row_blocks(view, self.block), largest(scores, self.blocks), block=self.block)
