"""Causal attention of new rows over the paged KV of their sequences, plain torch.

One instance serves one forward pass of a batch: prompts in chunks and single decode rows together.
Causality is `order_k <= order_q`, never a place in memory, so heads may have lost different slots; where a
slot is seen `until` some order, `order_q < until_k` holds too.
Knows nothing about models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable, SlotArray


class SequenceRows(NamedTuple):
    """Rows [start, stop) of the packed batch: the last slots of `sequence`, appended to the table before.

    `until`, where not every later row sees a slot: the first order that does not, of each slot.
    """

    sequence: str
    start: int
    stop: int
    until: IntArray | None = None  # [slots], with all heads alike


class PagedAttention:
    """Writes the batch's K and V into their pages and attends over everything each sequence has.

    The rows of `batch` cover the packed tensors; a sequence appears once. `layers` are those of the pass
    where it is not through all of them: the others have no slots for these rows.
    `observe` names rows of the packed batch whose rotated queries are kept, layer after layer, in
    `observed[sequence]`, each [rows, q_heads, d].
    """

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
    ) -> None:
        self._table = table
        self._store = store
        self._prompts = [rows for rows in batch if rows.stop - rows.start != 1]
        self._decodes = [rows for rows in batch if rows.stop - rows.start == 1]
        self._first_layer = 0 if layers is None else layers.start
        tails = [table.tail(rows.sequence, rows.stop - rows.start, layers) for rows in batch]
        self._new_slots = np.concatenate(tails, axis=2)  # [layers, kv_heads, rows in batch order]
        self._rows = torch.cat([torch.arange(rows.start, rows.stop) for rows in batch])
        self._observe = {name: torch.tensor(rows, dtype=torch.long) for name, rows in (observe or {}).items()}
        self.observed: dict[str, list[Tensor]] = {name: [] for name in self._observe}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs [N, Hq, d] for rotated q [N, Hq, d] and k, v [N, Hkv, d]; layers come in order."""
        rows = self._rows.to(k.device)
        slots = self._new_slots[layer - self._first_layer]
        self._store.write(slots, k[rows].transpose(0, 1), v[rows].transpose(0, 1))
        for name, observed in self._observe.items():
            self.observed[name].append(q[observed.to(q.device)])
        out = torch.empty_like(q)
        for prompt in self._prompts:
            out[prompt.start : prompt.stop] = self._prompt(layer, prompt, q[prompt.start : prompt.stop])
        if self._decodes:
            decoding = torch.tensor([decode.start for decode in self._decodes], device=q.device)
            out[decoding] = self._decode(layer, q[decoding])
        return out

    def _prompt(self, layer: int, rows: SequenceRows, q: Tensor) -> Tensor:
        """Rows of one sequence; KV heads are the batch axis, the query heads of a group the head axis."""
        slots, orders = self._table.slots(rows.sequence, layer), self._table.orders(rows.sequence, layer)
        k, v = self._read(slots, q)  # [kv_heads, S, d]
        grouped = q.transpose(0, 1).unflatten(0, (len(k), -1))  # [kv_heads, group, n, d]
        shape = grouped.shape[:2]
        # with nothing older in any head, row i sees the first i + 1 slots
        is_first = k.shape[1] == len(q) and rows.until is None
        visible = None if is_first else self._visible(orders, rows, layer).to(q.device)[:, None]
        out = functional.scaled_dot_product_attention(
            grouped,
            k[:, None].expand(*shape, -1, -1),
            v[:, None].expand(*shape, -1, -1),
            attn_mask=visible,
            is_causal=is_first,
        )
        return out.flatten(0, 1).transpose(0, 1)

    def _visible(self, orders: IntArray, rows: SequenceRows, layer: int) -> Tensor:
        """Which slots each row sees, bool [kv_heads or 1, n, S]; the new rows are alike in all heads."""
        query_orders = self._table.order(rows.sequence, layer, 0)[rows.start - rows.stop :]
        visible = orders[:, None, :] <= query_orders[:, None]
        if rows.until is not None:
            visible &= query_orders[:, None] < rows.until
        return torch.from_numpy(visible)

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """One row per sequence, padded to the longest; the query heads of a group are the row axis."""
        tables = [self._table.slots(rows.sequence, layer) for rows in self._decodes]
        longest = max(table.shape[1] for table in tables)
        slots = np.full((len(tables), self._table.kv_heads, longest), -1, np.int64)
        for row, table in zip(slots, tables, strict=True):
            row[:, : table.shape[1]] = table
        # the new row has the latest order of its sequence: whatever is there is visible
        visible = torch.from_numpy(slots >= 0).to(q.device)
        k, v = self._read(slots, q)  # [B, kv_heads, S, d]
        grouped = q.unflatten(1, (self._table.kv_heads, -1))  # [B, kv_heads, group, d]
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, :, None])
        return out.flatten(1, 2)

    def _read(self, slots: SlotArray, q: Tensor) -> tuple[Tensor, Tensor]:
        # padding repeats the head's own first slot: masked, finite, and never another sequence's content
        k, v = self._store.read(np.where(slots >= 0, slots, slots[..., :1]))
        return k.to(q.dtype), v.to(q.dtype)
