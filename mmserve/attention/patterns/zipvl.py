"""ZipVL: only tokens that get attention attend to each other; how many, each layer finds out.

Knows nothing about pages or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import row_order
from mmserve.kernels import pattern_index
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import TILE_FIELDS
from mmserve.pruning.settings import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipVL(AttentionPattern):
    """Important slots see the important ones before them.

    They are as many as it takes to get `mass` of the attention of some probe rows, and those that get most by
    each row that could give some.

    All heads of a layer have one set, as in the paper. Probes are a chunk's last rows and as many spread
    evenly over the others; the paper takes 64 and 64 at random of a whole prompt.
    Slots of earlier chunks are judged anew by each chunk. The paper gives rows that are not important no
    attention at all; a row must see itself here, so these see those of their own tile.
    """

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.08584"

    mass: float = number(0.975, 0, 1, "the share of the attention that important slots get", low_open=True)
    # more are not one call of the kernel
    probes: int = whole(16, 1, 64, "how many of the last rows of a chunk are asked, and as many others")

    @classmethod
    def everything(cls) -> Self:
        return cls(mass=1.0)

    def index(self, view: ChunkView) -> AttentionIndex:
        slots = row_order(view).long()
        is_important = self._important(view)
        takes_part = is_important[slots]
        among = int(takes_part.sum())
        rows = torch.cat([takes_part.nonzero().flatten(), (~takes_part).nonzero().flatten()])
        important = is_important.nonzero().flatten()
        first, last = self._tiles(view, among)
        # the lists of important rows all begin with the first important slot
        others = first >= among
        begin = torch.where(others, len(important) + first - among, 0)
        count = torch.where(
            others, last - first, torch.searchsorted(important, slots[rows[last - 1]], right=True)
        )
        launch = count.argsort(descending=True, stable=True)
        heads, device = view.queries.shape[1], slots.device
        tiles = torch.zeros(len(first), heads, TILE_FIELDS, dtype=torch.int32, device=device)
        tiles[..., 1] = torch.arange(heads, device=device)
        for field, values in ((2, first), (3, last - first), (8, begin), (9, count)):
            tiles[..., field] = values[launch, None]
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        return AttentionIndex(
            tile_rows=view.tile_rows,
            block_size=view.tile_rows,
            tiles=tiles.view(-1, TILE_FIELDS),
            rows=rows.int(),
            runs=nothing.view(0, 3),
            blocks=nothing,
            columns=torch.cat([important, slots[~takes_part]]).int(),
            row_order=slots.int(),
            key_begin=torch.zeros(1, view.keys.shape[1], dtype=torch.int64, device=device),
        )

    def _tiles(self, view: ChunkView, important: int) -> tuple[Tensor, Tensor]:
        """Where tiles begin and end in the rows, of which the first `important` ones are important."""
        step, n, device = view.tile_rows, len(view.rows), view.queries.device
        first = torch.cat(
            [torch.arange(0, important, step, device=device), torch.arange(important, n, step, device=device)]
        )
        return first, torch.cat([first[1:], first.new_tensor([n])])

    def _important(self, view: ChunkView) -> Tensor:
        """Which slots are, bool [S]."""
        orders, slots, n = row_order(view), len(view.keys), len(view.rows)
        if self.mass == 1:
            return torch.ones(slots, dtype=torch.bool, device=orders.device)
        recent = min(self.probes, n)
        spread = min(self.probes, n - recent)
        rows = [torch.arange(n - recent, n, device=orders.device)]
        if spread:
            rows.append(torch.arange(spread, device=orders.device) * (n - recent) // spread)
        seen = int(view.rows[-1]) + 1
        keys = view.keys[:seen].contiguous()
        got = torch.zeros(slots, device=orders.device)
        givers = torch.zeros(slots, device=orders.device)
        for part in rows:
            queries = view.queries[part].contiguous()
            found = pattern_index.probe(queries, keys, orders[part], None, scale=view.scale)
            got[:seen] += found.vertical.mean(0)
            blind = torch.searchsorted(orders[part].long(), torch.arange(seen, device=orders.device))
            givers[:seen] += len(part) - blind
        ordered = got.sort(descending=True).values
        count = 1 + (ordered.cumsum(0) < self.mass * got.sum()).sum()
        by_row = got / givers.clamp(min=1)
        rank = torch.empty_like(givers, dtype=torch.int64)
        rank[by_row.argsort(descending=True, stable=True)] = torch.arange(slots, device=orders.device)
        return rank < count
