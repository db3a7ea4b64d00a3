"""What a pattern loses: its recall in every layer, and one head's real map beside what it sees of it.

Costs a dense pass and more, so it runs only where somebody asks. Knows nothing about pages or requests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmserve.attention.density import pairs_of
from mmserve.kernels.prefill_attention import AttentionIndex, dense_index, prefill_attention
from mmserve.kernels.prefill_attention.index import key_slots, tile_keys, tile_rows_of

SIDE = 256  # most cells of a map, each way
DECADES = 5.0  # of attention that a map tells apart


class Probed(NamedTuple):
    """What was found; as in `request.AttentionReport`."""

    recall: tuple[float, ...]
    layer: int
    head: int
    chosen: str
    head_density: float
    head_recall: float
    cell: int
    side: int
    attention: bytes
    seen: bytes


class Probe:
    """Of one prompt of at most `slots` slots; the map is that of a query head of one layer."""

    def __init__(self, *, slots: int, layer: int, head: int) -> None:
        self.layer, self.head = layer, head
        self.chosen = ""  # what the pattern does in that head, where heads differ
        self._cell = -(-slots // SIDE)  # slots of a cell, each way
        side = -(-slots // self._cell)
        self._slots = 0
        self._recalled: dict[int, tuple[float, int]] = {}
        self._of_head = (0.0, 0)
        self._pairs = (0, 0)
        self._paid = torch.zeros(side, side)
        self._seen, self._visible = torch.zeros(side, side), torch.zeros(side, side)

    def add(
        self,
        layer: int,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        index: AttentionIndex | None,
        lse: Tensor | None,
    ) -> None:
        """The last slots' queries q [n, Hq, d]; of the leading ones, what an index of them gave as LSE."""
        rows, heads, width = q.shape
        every = dense_index([rows], [len(keys)], q_heads=heads, kv_heads=keys.shape[1], device=q.device)
        dense = prefill_attention(q, keys, values, every, scale=width**-0.5).lse
        recall = torch.ones_like(dense)
        if lse is not None:
            # rounding may leave a part with more than the whole
            recall[: len(lse)] = (lse - dense[: len(lse)]).exp().clamp(max=1.0)
        self._recalled[layer] = _plus(self._recalled.get(layer, (0.0, 0)), recall)
        if layer == self.layer:
            self._of_head = _plus(self._of_head, recall[:, self.head])
            self._draw(q, keys, dense, index)

    def found(self, layers: int) -> Probed:
        """What was found, over all chunks so far."""
        recall = [_mean(*self._recalled.get(layer, (1.0, 1))) for layer in range(layers)]
        paid = (1 + self._paid.clamp(min=1e-30).log10() / DECADES).clamp(0, 1)
        seen = self._seen / self._visible.clamp(min=1)
        side = -(-self._slots // self._cell)
        attention, shown = (
            (255 * part[:side, :side]).round().to(torch.uint8).numpy().tobytes() for part in (paid, seen)
        )
        return Probed(
            recall=tuple(recall),
            layer=self.layer,
            head=self.head,
            chosen=self.chosen,
            head_density=_mean(*self._pairs),
            head_recall=_mean(*self._of_head),
            cell=self._cell,
            side=side,
            attention=attention,
            seen=shown,
        )

    def _draw(self, q: Tensor, keys: Tensor, dense: Tensor, index: AttentionIndex | None) -> None:
        """Mark the rows of one chunk on the map."""
        rows, heads, width = q.shape
        slots, first = len(keys), len(keys) - rows
        self._slots = slots
        key = keys[:, self.head // (heads // keys.shape[1])].float()
        order = torch.arange(first, slots, device=q.device)
        visible = torch.arange(slots, device=q.device) <= order[:, None]
        logits = q[:, self.head].float() @ key.T * width**-0.5 - dense[:, self.head, None].float()
        paid = torch.where(visible, logits.exp(), 0.0)
        seen = visible
        if index is not None:
            seen = visible & _mask(index, self.head, rows, slots)
            pairs = pairs_of(index, head=self.head)
            self._pairs = self._pairs[0] + int(pairs.computed), self._pairs[1] + int(pairs.dense)
        own = order[0 if index is None else len(index.row_order) :]
        self._pairs = self._pairs[0] + int((own + 1).sum()), self._pairs[1] + int((own + 1).sum())
        cells = (order // self._cell).cpu()
        largest = self._across(paid, "amax")
        self._paid.scatter_reduce_(0, cells[:, None].expand_as(largest), largest, "amax")
        self._seen.index_add_(0, cells, self._across(seen, "sum"))
        self._visible.index_add_(0, cells, self._across(visible, "sum"))

    def _across(self, pairs: Tensor, how: str) -> Tensor:
        """Cells of each row, fp32 [n, side]."""
        missing = len(self._paid) * self._cell - pairs.shape[1]
        cells = torch.nn.functional.pad(pairs.float(), (0, missing)).unflatten(1, (-1, self._cell))
        found: Tensor = cells.amax(-1) if how == "amax" else cells.sum(-1)
        return found.cpu()


def _mean(total: float, count: int) -> float:
    return total / count if count else 1.0


def _plus(known: tuple[float, int], recall: Tensor) -> tuple[float, int]:
    return known[0] + float(recall.sum()), known[1] + math.prod(recall.shape)


def _mask(index: AttentionIndex, head: int, rows: int, slots: int) -> Tensor:
    """Which slots the rows of a head list, bool [rows, slots]; rows past those of the index list all."""
    group = head + 1  # one sequence whose axes begin at 0: all heads are as the first
    mask = torch.zeros(rows, slots, dtype=torch.bool, device=index.rows.device)
    mask[len(index.row_order) :] = True
    for tile in index.tiles.tolist():
        if tile[1] == head and tile[3]:
            listed = key_slots(index, tile, tile_keys(index, tile), group)
            mask[tile_rows_of(index, tile)[:, None], listed] = True
    return mask
