"""Attention over paged KV on a GPU, by the kernels of `mmserve.kernels`; no call waits for the device.

Everything that depends on where slots lie is built on the host once per step, for all layers, and copied
without waiting. Knows nothing about models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.paged import PagedAttention, SequenceRows, Watch
from mmserve.attention.tiles import Chunk, segmented_index, tile_rows_for
from mmserve.attention.visibility import segments
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.norm_rope import rope_append
from mmserve.kernels.paged_decode import Decoded, PageScales, naive_pages
from mmserve.kernels.prefill_attention import AttentionIndex, dense_index, prefill_attention
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable
from mmserve.models.fused import Rotation

# page tables grow by so many rows and pages: the part of every layer is aligned, and few kernels are compiled
ROW_STEP, PAGE_STEP = 4, 16
INTERPRETED_SPLITS = 2


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of what a host array holds now; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HeadTables(NamedTuple):
    """Where the KV of some sequences lies; rows past the last sequence are 0."""

    pages: IntArray  # [layers, rows, kv_heads, max_pages], those reserved too
    lengths: IntArray  # [layers, rows, kv_heads]

    @classmethod
    def of(cls, table: PageTable, sequences: Sequence[str]) -> HeadTables:
        found = [table.pages(name) for name in sequences]
        rows = _rounded(len(found), ROW_STEP)
        width = _rounded(max(pages.shape[2] for pages in found), PAGE_STEP)
        tables = cls(
            np.zeros((table.layers, rows, table.kv_heads, width), np.int32),
            np.zeros((table.layers, rows, table.kv_heads), np.int32),
        )
        for row, (name, pages) in enumerate(zip(sequences, found, strict=True)):
            tables.pages[:, row, :, : pages.shape[2]] = pages
            tables.lengths[:, row] = table.lengths(name)
        return tables


def append(qkv: Tensor, rotation: Rotation, slots: Tensor, store: PageStore) -> Tensor:
    """Rotated queries [N, Hq, d] of products qkv [N, Hq + 2 * Hkv, d]; keys and values go into their pages.

    slots int64 [Hkv, N]; those below 0 are not written.
    """
    positions, frequencies, q_weight, k_weight, eps = rotation
    return rope_append(
        qkv, positions, frequencies, slots, store.k, store.v, q_weight=q_weight, k_weight=k_weight, eps=eps
    )


def decode_attention(q: Tensor, store: PageStore, pages: Tensor, lengths: Tensor) -> Tensor:
    """Outputs of one row per sequence q [B, Hq, d], whose own K and V are written already.

    pages int32 [B, kv_heads, max_pages] and lengths int32 [B, kv_heads] are those of one layer.
    """
    return page_attention(q, store.k, store.v, pages, lengths).out


def page_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor, scales: PageScales | None = None
) -> Decoded:
    """The same over any pages k and v, with the LSE of every row; a head may have no slots."""
    scale = q.shape[-1] ** -0.5
    if backend_for(q.device) == "naive":
        found = naive_pages.paged_decode(q, k, v, pages, lengths, scale=scale, scales=scales)
        return found._replace(out=found.out.to(q.dtype))
    # triton is imported only where it runs
    from mmserve.kernels.paged_decode import triton

    # elsewhere the number of processors would be asked for
    splits = None if q.is_cuda else INTERPRETED_SPLITS
    return triton.paged_decode(q, k, v, pages, lengths, scale=scale, scales=scales, splits=splits)


class CudaAttention(PagedAttention):
    """The same results as `PagedAttention`, without gathering and without waiting."""

    is_fused = True

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
        watch: Sequence[Watch] = (),
    ) -> None:
        batch = sorted(batch, key=lambda rows: rows.start)
        super().__init__(table, store, batch, observe, layers, watch)
        device = store.k.device
        self._slots = to_device(self._new_slots, device)  # [layers, kv_heads, N]
        self._observe = {
            name: to_device(np.array(rows, np.int64), device) for name, rows in (observe or {}).items()
        }
        tables = HeadTables.of(table, [rows.sequence for rows in batch])
        self._pages, self._lengths = to_device(tables.pages, device), to_device(tables.lengths, device)
        self._singles = next((at for at, rows in enumerate(batch) if rows.stop != at + 1), len(batch))
        self._rows_alone, self._chunks = batch[: self._singles], batch[self._singles :]
        self._chunk_lengths = tables.lengths[:, self._singles : len(batch)]
        self._dense: dict[tuple[int, ...], _Chunks] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype is not self._store.k.dtype:
            return super().attend(layer, q, k, v)
        self._store.write(self._slots[layer - self._first_layer], k.transpose(0, 1), v.transpose(0, 1))
        return self._outputs(layer, q.contiguous())

    def attend_products(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """As `attend`, of what the layer's products are before they are rotated; see `models.fused`."""
        slots = self._slots[layer - self._first_layer]
        return self._outputs(layer, append(qkv, rotation, slots, self._store))

    def _outputs(self, layer: int, q: Tensor) -> Tensor:
        self._look(layer, q)
        singles, parts = self._singles, []
        if singles:
            pages, lengths = self._decode_pages(layer, q[:singles])
            parts.append(decode_attention(q[:singles], self._store, pages, lengths))
        if self._chunks:
            parts.append(self._prompts_outputs(layer, q[singles:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_pages(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Pages int32 [singles, kv_heads, most] and lengths [singles, kv_heads] that single rows q read."""
        pages, lengths = self._pages[layer, : len(q)], self._lengths[layer, : len(q)]
        found = self._selected(layer, self._rows_alone, q)
        if all(selected is None for selected in found):
            return pages, lengths
        pages, lengths = pages.clone(), lengths.clone()
        for row, selected in enumerate(found):
            if selected is not None:
                pages[row, :, : selected.pages.shape[1]] = selected.pages
                lengths[row] = to_device(selected.lengths, lengths.device)
        return pages, lengths

    def _prompts_outputs(self, layer: int, q: Tensor) -> Tensor:
        """Of the chunks' rows q; a pattern may take the leading ones of some, the others go together."""
        outs: list[Tensor] = []
        rest: list[SequenceRows] = []
        for rows in self._chunks:
            sparse, start = self._sparse.get(rows.sequence), rows.start - self._singles
            found = None if sparse is None else sparse.attend(layer, q[start : rows.stop - self._singles])
            outs.append(q[:0] if found is None else found)
            rest.append(rows._replace(start=rows.start + len(outs[-1])))
        if not any(map(len, outs)):
            return self._causal(rest).attend(layer, q)
        left = [q[rows.start - self._singles : rows.stop - self._singles] for rows in rest]
        dense = self._causal(rest).attend(layer, torch.cat(left)) if any(map(len, left)) else q[:0]
        parts = zip(outs, dense.split([len(rows) for rows in left]), strict=True)
        return torch.cat([part for both in parts for part in both])

    def _causal(self, chunks: Sequence[SequenceRows]) -> _Chunks:
        """Dense attention of what is left of each chunk; the same ones in most layers."""
        key = tuple(rows.start for rows in chunks)
        if key not in self._dense:
            there = [at for at, rows in enumerate(chunks) if rows.stop > rows.start]
            pages = self._pages[:, self._singles : self._singles + len(chunks)]
            if len(there) < len(chunks):
                pages = pages.index_select(1, to_device(np.array(there), pages.device))
            own, lengths = [chunks[at] for at in there], self._chunk_lengths[:, there]
            self._dense[key] = _Chunks(self._table, self._store, own, lengths, pages)
        return self._dense[key]


class _Chunks:
    """Chunks of prompts, causal: row i of n sees all but the last n - i - 1 slots of each head.

    Where slots are not seen by all later rows, tiles are segments of a chunk; see `visibility`.
    Heads may have lost different slots, so each KV head of each sequence is an axis of its own, and its
    query heads' rows are rows of their own: q [N, kv_heads * group, d] is read as [N * kv_heads, group, d].
    """

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        chunks: Sequence[SequenceRows],
        lengths: IntArray,  # [layers, chunks, kv_heads]
        pages: Tensor,  # on the device, [layers, chunks, kv_heads, max_pages]
    ) -> None:
        self._store, self._kv_heads = store, table.kv_heads
        runs = [table.runs(rows.sequence).first for rows in chunks]
        # slots that lie in one run are read as they lie, on some chips by the tensor memory accelerator
        self._pages = None if all(len(first) == 1 for first in runs) else pages
        begins = np.stack([first[0] for first in runs], axis=1).reshape(table.layers, -1, 1)
        self._begins = to_device(begins, store.k.device)  # [layers, axes, 1]
        starts = accumulate((rows.stop - rows.start for rows in chunks[:-1]), initial=0)
        self._chunks = [_chunk(table, rows, start) for rows, start in zip(chunks, starts, strict=True)]
        self._lengths = lengths.reshape(table.layers, -1)
        self._indexes: dict[tuple[int, bytes], AttentionIndex] = {}

    def attend(self, layer: int, q: Tensor) -> Tensor:
        group, width = q.shape[1] // self._kv_heads, q.shape[2]
        k, v, tables = self._store.k, self._store.v, None
        if self._pages is None:
            k, v = k.view(-1, 1, width), v.view(-1, 1, width)
        else:
            tables = self._pages[layer].flatten(0, 1)[:, None]
        packed = q.view(-1, group, width)
        index = replace(self._index(layer, group), key_begin=self._begins[layer])
        found = prefill_attention(packed, k, v, index, scale=width**-0.5, tables=tables)
        return found.out.view(q.shape)

    def _index(self, layer: int, group: int) -> AttentionIndex:
        """That of a layer, which is mostly that of all layers."""
        key = (group, self._lengths[layer].tobytes())
        if key not in self._indexes:
            self._indexes[key] = self._build(layer, group)
        return self._indexes[key]

    def _build(self, layer: int, group: int) -> AttentionIndex:
        device, lengths = self._store.k.device, self._lengths[layer]
        tile_rows = tile_rows_for(self._store.k)
        if any(chunk.segments is not None for chunk in self._chunks):
            of_heads = lengths.reshape(-1, self._kv_heads)
            index = segmented_index(self._chunks, of_heads, group=group, tile_rows=tile_rows)
        else:
            index = self._dense(lengths, group, tile_rows)
        return replace(
            index,
            tiles=to_device(index.tiles.numpy(), device),
            rows=to_device(index.rows.numpy(), device),
            runs=to_device(index.runs.numpy(), device),
            blocks=to_device(index.blocks.numpy(), device),
            columns=to_device(index.columns.numpy(), device),
            row_order=to_device(index.row_order.numpy(), device),
        )

    def _dense(self, lengths: IntArray, group: int, tile_rows: int) -> AttentionIndex:
        heads = self._kv_heads
        index = dense_index(
            [chunk.rows for chunk in self._chunks for _ in range(heads)],
            lengths.tolist(),
            q_heads=group,
            kv_heads=1,
            tile_rows=tile_rows,
        )
        # its rows come head after head, ours row after row
        places = [
            (chunk.start + np.arange(chunk.rows)) * heads + head
            for chunk in self._chunks
            for head in range(heads)
        ]
        rows = np.concatenate(places).astype(np.int32)
        orders = np.empty_like(rows)
        orders[rows] = index.row_order.numpy()
        return replace(index, rows=torch.from_numpy(rows), row_order=torch.from_numpy(orders))


def _chunk(table: PageTable, rows: SequenceRows, start: int) -> Chunk:
    """A chunk whose first row is the packed row `start`."""
    count = rows.stop - rows.start
    if rows.until is None:
        return Chunk(start, count)
    found = segments(table.order(rows.sequence, 0, 0), rows.until, count)
    return Chunk(start, count, found)


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
