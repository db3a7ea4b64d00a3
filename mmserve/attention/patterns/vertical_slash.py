"""MInference's vertical-slash heads (arXiv 2407.02490, section 3.2 and algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import Lists, RowBlocks, assemble, listed, row_blocks
from mmserve.attention.patterns.scores import PROBE_ROWS, largest, last_rows, probe
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole

BLOCK = 64  # rows that share what they see
SINK, NEAREST = 30, 100  # keys and diagonals that are always seen
MAX_LINES = 1 << 30


class Slashes(NamedTuple):
    """Chosen diagonals as a block of rows sees them: which keys at which distance before its first row."""

    seen: Tensor  # bool [heads, reach + slots]: distance -reach + 1 and more
    # int64 [heads, most runs]: runs of distances, from the farthest on; near > far where none is
    near: Tensor
    far: Tensor
    reach: int  # rows of the longest block, those left out between them counted


@dataclass(frozen=True, slots=True, kw_only=True)
class VerticalSlash(AttentionPattern):
    """Rows see the `vertical` keys and `slash` diagonals with most weight in the chunk's last 64 rows.

    Algorithm 1. As in the authors' code the first 30 keys and the nearest 100 diagonals are always seen,
    and 64 rows share what one of them sees, so that a diagonal becomes a run of keys. What differs: every
    chunk measures its own last rows against all slots so far. The authors search the two numbers for each
    head offline; these are the smallest that MMInference (arXiv 2504.16083, table 4) tries on video models.
    """

    name: ClassVar[str] = "vertical_slash"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02490"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    vertical: int = whole(1000, SINK, MAX_LINES, "how many columns")
    slash: int = whole(1024, NEAREST, MAX_LINES, "how many diagonals")

    @classmethod
    def everything(cls) -> Self:
        return cls(slash=MAX_LINES)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows = row_blocks(view, BLOCK)
        found = probe(view, last_rows(view, PROBE_ROWS))
        found.vertical[:, :SINK] = torch.inf
        found.slash[:, :NEAREST] = torch.inf
        reach = int((rows.last - rows.first).max()) + 1
        slashes = slashes_of(largest(found.slash, self.slash), reach)
        best = found.vertical.topk(min(self.vertical, found.vertical.shape[1]), sorted=False).indices
        columns = columns_of(rows, best.sort(-1).values, slashes)
        return assemble(view, rows, runs=runs_of(rows, slashes), columns=columns)


def slashes_of(chosen: Tensor, reach: int) -> Slashes:
    """From chosen bool [heads, slots]: diagonals by how many keys they lie before their row."""
    heads, slots = chosen.shape
    # a key d before the first row is on diagonals d to d + reach - 1 of the rows of its block
    before = torch.zeros(heads, slots + 2 * reach, dtype=torch.int32, device=chosen.device)
    before[:, reach : reach + slots] = chosen.cumsum(-1, dtype=torch.int32)
    before[:, reach + slots :] = before[:, reach + slots - 1 : reach + slots]
    seen = before[:, reach:] > before[:, :-reach]
    edge = torch.zeros_like(seen[:, :1])
    padded = torch.cat([edge, seen, edge], -1)
    begins, ends = seen & ~padded[:, :-2], seen & ~padded[:, 2:]
    count = begins.sum(-1)
    inside = torch.arange(int(count.max()), device=chosen.device) < count[:, None]
    near = torch.full(inside.shape, slots + reach, device=chosen.device)
    far = torch.full_like(near, -reach - 1)
    near[inside] = begins.nonzero()[:, 1] - reach + 1
    far[inside] = ends.nonzero()[:, 1] - reach + 1
    return Slashes(seen, near.flip(-1), far.flip(-1), reach)


def runs_of(rows: RowBlocks, slashes: Slashes) -> Lists:
    """The keys of the diagonals before each block of rows, as runs."""
    first, last = rows.first[:, None], rows.last[:, None]
    start = (first - slashes.far[:, None]).clamp(min=0)
    stop = torch.minimum(first - slashes.near[:, None], last) + 1
    inside = start < stop
    runs = [listed(inside, values) for values in (start, torch.ones_like(start), stop - start)]
    return runs[0]._replace(values=torch.stack([each.values for each in runs], 1))


def columns_of(rows: RowBlocks, columns: Tensor, slashes: Slashes) -> Lists:
    """Those of the columns int64 [heads, n] that each block of rows has before it and on no diagonal."""
    distance = rows.first[:, None] - columns[:, None]  # [heads, blocks, n]
    place = (distance + slashes.reach - 1).clamp(min=0)
    on = slashes.seen[:, None].expand(-1, len(rows.first), -1).gather(2, place)
    return listed((distance > 0) & ~on, columns[:, None])
