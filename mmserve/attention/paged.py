"""Causal attention of new rows over the paged KV of their sequences, plain torch.

One instance serves one forward pass of a batch: prompts in chunks and single decode rows together.
Causality is `order_k <= order_q`, never a place in memory, so heads may have lost different slots; where a
slot is seen `until` some order, `order_q < until_k` holds too.
Knows nothing about models or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.selection import PageSelection, Selected
from mmserve.attention.sparse import SparseChunk, SparseRows
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable, SlotArray


class SequenceRows(NamedTuple):
    """Rows [start, stop) of the packed batch: the last slots of `sequence`, appended to the table before.

    `until`, where not every later row sees a slot: the first order that does not, of each slot. `sparse`,
    where a pattern may say what the rows see; the two do not go together. `selection`, where a row of an
    answer reads only some pages.
    """

    sequence: str
    start: int
    stop: int
    until: IntArray | None = None  # [slots], with all heads alike
    sparse: SparseRows | None = None
    selection: PageSelection | None = None


class Watch(NamedTuple):
    """Rows of the packed batch that `see` is shown: their layer, rotated queries and inputs [rows, D]."""

    rows: range
    see: Callable[[int, Tensor, Tensor], None]


class PagedAttention:
    """Writes the batch's K and V into their pages and attends over everything each sequence has.

    The rows of `batch` cover the packed tensors; a sequence appears once. `layers` are those of the pass
    where it is not through all of them: the others have no slots for these rows.
    `observe` names rows of the packed batch whose rotated queries are kept, layer after layer, in
    `observed[sequence]`, each [rows, q_heads, d]; `watch` says who is shown which rows, layer by layer, once
    their K and V are written.
    """

    is_fused: ClassVar[bool] = False  # takes products before they are rotated, as `models.fused` has them

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
        watch: Sequence[Watch] = (),
    ) -> None:
        self._table = table
        self._store = store
        self._prompts = [rows for rows in batch if rows.stop - rows.start != 1]
        self._decodes = [rows for rows in batch if rows.stop - rows.start == 1]
        for rows in self._decodes:
            if rows.selection is not None:
                rows.selection.begin_step()
        self._sparse = {
            rows.sequence: SparseChunk(table, store, rows.sequence, rows.stop - rows.start, rows.sparse)
            for rows in self._prompts
            if rows.sparse is not None
        }
        self._first_layer = 0 if layers is None else layers.start
        tails = [table.tail(rows.sequence, rows.stop - rows.start, layers) for rows in batch]
        self._new_slots = np.concatenate(tails, axis=2)  # [layers, kv_heads, rows in batch order]
        self._rows = torch.cat([torch.arange(rows.start, rows.stop) for rows in batch])
        self._observe = {name: torch.tensor(rows, dtype=torch.long) for name, rows in (observe or {}).items()}
        self.observed: dict[str, list[Tensor]] = {name: [] for name in self._observe}
        self._watch = watch
        self._inputs = torch.empty(0)  # of the layer that attends next

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs [N, Hq, d] for rotated q [N, Hq, d] and k, v [N, Hkv, d]; layers come in order."""
        rows = self._rows.to(k.device)
        slots = self._new_slots[layer - self._first_layer]
        self._store.write(slots, k[rows].transpose(0, 1), v[rows].transpose(0, 1))
        self._look(layer, q)
        out = torch.empty_like(q)
        for prompt in self._prompts:
            out[prompt.start : prompt.stop] = self._chunk(layer, prompt, q[prompt.start : prompt.stop])
        if self._decodes:
            decoding = torch.tensor([decode.start for decode in self._decodes], device=q.device)
            out[decoding] = self._decode(layer, q[decoding])
        return out

    def tap(self, inputs: Tensor) -> None:
        """What comes into the layer that attends next, normed [N, D]."""
        self._inputs = inputs

    def _look(self, layer: int, q: Tensor) -> None:
        """Keep what is observed, show what is watched."""
        for name, observed in self._observe.items():
            self.observed[name].append(q.index_select(0, observed.to(q.device)))
        for watch in self._watch:
            rows = slice(watch.rows.start, watch.rows.stop)
            watch.see(layer, q[rows], self._inputs[rows])

    def _chunk(self, layer: int, rows: SequenceRows, q: Tensor) -> Tensor:
        """Rows of one sequence, of which a pattern may take the leading ones."""
        sparse = self._sparse.get(rows.sequence)
        found = None if sparse is None else sparse.attend(layer, q)
        if found is None:
            return self._prompt(layer, rows, q)
        if len(found) == len(q):
            return found
        rest = self._prompt(layer, rows._replace(start=rows.start + len(found)), q[len(found) :])
        return torch.cat([found, rest])

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
        tables = [
            self._table.slots(rows.sequence, layer) if found is None else found.slots(self._table.page_size)
            for rows, found in zip(self._decodes, self._selected(layer, self._decodes, q), strict=True)
        ]
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

    def _selected(self, layer: int, decodes: Sequence[SequenceRows], q: Tensor) -> list[Selected | None]:
        """Of these rows q, one of each decode, those that do not read everything."""
        return [
            None if rows.selection is None else rows.selection.select(layer, row)
            for rows, row in zip(decodes, q, strict=True)
        ]

    def _read(self, slots: SlotArray, q: Tensor) -> tuple[Tensor, Tensor]:
        # padding repeats the head's own first slot: masked, finite, and never another sequence's content
        k, v = self._store.read(np.where(slots >= 0, slots, slots[..., :1]))
        return k.to(q.dtype), v.to(q.dtype)
