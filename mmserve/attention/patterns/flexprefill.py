"""FlexPrefill (arXiv 2502.20766, algorithms 1 to 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import RowBlocks, from_blocks, row_blocks, row_order
from mmserve.attention.patterns.scores import block_scores, block_size, fewest, largest, last_rows, probe
from mmserve.kernels import pattern_index
from mmserve.kernels.pattern_index import Probe
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import number, whole

MAX_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexPrefill(AttentionPattern):
    """Each head sees as many blocks of keys as hold the share `gamma` of its attention.

    Algorithm 2: if the scores of mean keys tell what the last block of rows really look at (the root of the
    Jensen-Shannon divergence is below `tau`), the head is query-aware: of all pairs of blocks those with
    most weight, by scores of means, up to the share (algorithm 4). Else columns and diagonals of blocks, as
    many as the last rows need for the share (algorithm 3), at least `min_budget` keys of each. As in the
    authors' code query-aware heads see `min_budget` keys of columns and diagonals too, the first block of
    keys and the own diagonal are always seen, and blocks of columns are counted from the keys that reach
    the share. What differs: the last rows are the chunk's; a chunk may begin inside a block of keys, then
    its diagonals are those of the nearest block; rows of blocks share their budget within a chunk.
    """

    name: ClassVar[str] = "flexprefill"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.20766"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    gamma: float = number(0.95, 0, 1, "the share of attention that is seen", low_open=True)
    tau: float = number(0.1, 0, 1, "heads whose divergence is below it are query-aware")
    min_budget: int = whole(1024, 1, MAX_TOKENS, "how many keys of columns, and of diagonals, at least")
    block: int = block_size(128, "rows and keys of a block")

    @classmethod
    def everything(cls) -> Self:
        return cls(min_budget=MAX_TOKENS)

    def index(self, view: ChunkView) -> AttentionIndex:
        block = self.block
        rows = row_blocks(view, block)
        count = last_rows(view, block)
        found = probe(view, count)
        found = Probe(found.vertical / count, found.slash / count)
        vertical, slash = (_by_block(sums, block) for sums in found)
        is_aware = _divergence(_estimate(view, count, block)[:, : vertical.shape[1]], vertical) < self.tau
        floor = math.ceil(self.min_budget / block)
        budgets = [
            torch.where(is_aware, 0, _cover(sums, self.gamma) // block + 1).clamp(min=floor) for sums in found
        ]
        vertical[:, 0] = slash[:, 0] = torch.inf
        columns, diagonals = (
            largest(sums, budget) for sums, budget in zip((vertical, slash), budgets, strict=True)
        )
        seen = columns[:, None] | _on_diagonals(rows, diagonals)
        if bool(is_aware.any()):
            scores = block_scores(view, block, block)[is_aware, :, : seen.shape[2]]
            seen[is_aware] |= self._aware(scores)
        return from_blocks(view, rows, seen, block=block)

    def _aware(self, scores: Tensor) -> Tensor:
        """Pairs of blocks that hold the share of all attention, from their scores [heads, rows, keys]."""
        weights = torch.softmax(scores, -1).flatten(1)
        need = torch.full_like(weights[:, 0], self.gamma * scores.shape[1])
        return fewest(weights, need).view_as(scores)


def _by_block(sums: Tensor, block: int) -> Tensor:
    """Sums of blocks of the last dimension, the last one as long as it is."""
    whole = functional.pad(sums, (0, -sums.shape[1] % block))
    blocks: Tensor = whole.unflatten(1, (-1, block)).sum(-1)
    return blocks


def _cover(weights: Tensor, share: float) -> Tensor:
    """How many of the largest weights of each row hold a share of 1."""
    return (weights.sort(-1, descending=True).values.cumsum(-1) <= share).sum(-1) + 1


def _estimate(view: ChunkView, count: int, block: int) -> Tensor:
    """What the mean of the last rows looks at by mean keys: [heads, blocks]."""
    scores = pattern_index.block_scores(
        view.queries[-count:].contiguous(),
        view.keys.contiguous(),
        row_order(view)[-count:],
        None,
        block=count,
        key_block=block,
        scale=view.scale,
    )
    return torch.softmax(scores[:, 0], -1)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """The root of the Jensen-Shannon divergence of distributions [heads, blocks]."""
    mean = (one + other) / 2
    # a block that neither looks at adds nothing
    parts = [torch.special.xlogy(each, each / mean.clamp(min=1e-30)).sum(-1) for each in (one, other)]
    divergence: Tensor = (parts[0] + parts[1]) / 2
    return divergence.clamp(min=0).sqrt()


def _on_diagonals(rows: RowBlocks, chosen: Tensor) -> Tensor:
    """Blocks of keys [heads, row blocks, key blocks] that lie a chosen number of blocks before the rows."""
    blocks = chosen.shape[1]
    own = (rows.first + rows.size // 2) // rows.size
    before = own[:, None] - torch.arange(blocks, device=own.device)
    return chosen[:, before.clamp(0, blocks - 1)] & (before >= 0) & (before < blocks)
