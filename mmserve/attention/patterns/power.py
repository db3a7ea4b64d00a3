"""PowerAttention: key blocks at distances that are powers of two. Knows nothing about scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import ALL
from mmserve.attention.patterns.assemble import RowBlocks, from_blocks, row_blocks
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerAttention(AttentionPattern):
    """A row sees the first blocks, the last `window` blocks, and those 1, 2, 4, ... blocks before its own.

    So L layers reach back 2^L blocks with log(n) blocks a row. The paper trains models with this mask (1 B
    tokens); others lose what no path of powers carries to the answer. Blocks are cut on the prompt's slots,
    as in the paper, whatever the chunk; rows that share a tile across such a cut see what either block sees.
    """

    name: ClassVar[str] = "power"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03588"
    trained_weights: ClassVar[bool] = True

    block: int = whole(256, 1, 65536, "slots of a block")
    window: int = whole(5, 1, ALL, "how many of the latest blocks, the row's own among them")
    sink: int = whole(1, 0, ALL, "how many of the first blocks every row sees")

    @classmethod
    def everything(cls) -> Self:
        return cls(window=ALL)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.block)
        seen = self._seen(rows, -(-len(view.keys) // self.block))
        return from_blocks(view, rows, seen[None], block=self.block)

    def _seen(self, rows: RowBlocks, blocks: int) -> Tensor:
        """Which blocks each block of rows sees, bool [row blocks, blocks]."""
        key_block = torch.arange(blocks, device=rows.first.device)
        seen = key_block.expand(len(rows.first), blocks) < self.sink
        for edge in (rows.first, rows.last):
            distance = (edge // self.block)[:, None] - key_block
            is_power = (distance > 0) & (distance & (distance - 1) == 0)
            seen = seen | is_power | ((distance >= 0) & (distance < self.window))
        return seen
