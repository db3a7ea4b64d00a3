"""CritiPrefill (arXiv 2409.12490, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import from_blocks, row_blocks
from mmserve.attention.patterns.scores import block_size, largest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole

PREVIOUS = 0.25  # share of the layer before in a layer's scores
MAX_TOKENS = 1 << 30


class Earlier(NamedTuple):
    """What the layer before thought of the same rows."""

    rows: tuple[int, int]  # slots of the first and of the last
    weights: Tensor  # [Hkv, segments, blocks]


@dataclass(frozen=True, slots=True, kw_only=True)
class CritiPrefill(AttentionPattern):
    """Segments of rows see the blocks of keys that matter most to them, `budget` keys, and their own.

    How much a block matters to a segment: with the largest and the smallest value of each channel of a
    segment's rows, and of a block's keys, the larger of mean(q_max, q_min) k_max and mean(q_max, q_min)
    k_min, averaged over the heads of a group, then a softmax over the keys before the segment, of which a
    quarter is the layer's before (layer fusion). The heads of a group see the same. What differs: segments
    are counted from the chunk's first row; which rows, layers and short prompts stay dense is the same rule
    for all patterns, not the paper's; the layer before counts if it attended by this pattern, to the same
    rows.
    """

    name: ClassVar[str] = "critiprefill"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.12490"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    budget: int = whole(2048, 1, MAX_TOKENS, "how many keys a segment sees besides its own")
    segment: int = block_size(512, "rows of a segment")
    block: int = block_size(32, "keys of a block")

    @classmethod
    def everything(cls) -> Self:
        return cls(budget=MAX_TOKENS)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, self.segment)
        # blocks before some segment
        whole = int(view.rows[(len(rows.first) - 1) * self.segment]) // self.block
        if whole == 0:
            none = torch.zeros(1, len(rows.first), 1, dtype=torch.bool, device=rows.first.device)
            return from_blocks(view, rows, none, block=self.block)
        visible = torch.arange(whole, device=rows.first.device) < (rows.first // self.block)[:, None]
        scores = _scores(view, self.segment, self.block, whole).masked_fill(~visible, -torch.inf)
        # a segment may have nothing before it
        weights = self._fused(view, torch.softmax(scores, -1).nan_to_num(0.0))
        return from_blocks(view, rows, largest(weights, -(-self.budget // self.block)), block=self.block)

    def _fused(self, view: ChunkView, weights: Tensor) -> Tensor:
        if view.memory is None:
            return weights
        ends = (int(view.rows[0]), int(view.rows[-1]))
        earlier = view.memory.pop(view.layer - 1, None)
        if isinstance(earlier, Earlier) and earlier.rows == ends and earlier.weights.shape == weights.shape:
            weights = PREVIOUS * earlier.weights + (1 - PREVIOUS) * weights
        view.memory[view.layer] = Earlier(ends, weights)
        return weights


def _scores(view: ChunkView, segment: int, block: int, blocks: int) -> Tensor:
    """How much the first blocks of keys matter to each segment: fp32 [Hkv, segments, blocks]."""
    keys = view.keys[: blocks * block].unflatten(0, (-1, block))
    rows = torch.stack(
        [(part.amax(0).float() + part.amin(0).float()) / 2 for part in view.queries.split(segment)]
    )
    grouped = rows.unflatten(1, (view.keys.shape[1], -1))  # [segments, Hkv, group, d]
    highest, lowest = (
        torch.einsum("shgd,bhd->hgsb", grouped, extreme.float()) for extreme in (keys.amax(1), keys.amin(1))
    )
    return torch.maximum(highest, lowest).mean(1)
