"""Attention over paged KV on a GPU, by the kernels of `mmserve.kernels`; no call waits for the device.

Everything that depends on where slots lie is built on the host once per step, for all layers, and copied
without waiting. Knows nothing about models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.tiles import Chunk, segmented_index
from mmserve.attention.visibility import segments
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.norm_rope import rope_append
from mmserve.kernels.paged_decode import naive_pages
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
    scale = q.shape[-1] ** -0.5
    if backend_for(q.device) == "naive":
        return naive_pages.paged_decode(q, store.k, store.v, pages, lengths, scale=scale).out.to(q.dtype)
    # triton is imported only where it runs
    from mmserve.kernels.paged_decode import triton

    # elsewhere the number of processors would be asked for
    splits = None if q.is_cuda else INTERPRETED_SPLITS
    return triton.paged_decode(q, store.k, store.v, pages, lengths, scale=scale, splits=splits).out


class CudaAttention(PagedAttention):
    """The same results as `PagedAttention`, without gathering and without waiting."""

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
    ) -> None:
        batch = sorted(batch, key=lambda rows: rows.start)
        super().__init__(table, store, batch, observe, layers)
        device = store.k.device
        self._slots = to_device(self._new_slots, device)  # [layers, kv_heads, N]
        self._observe = {
            name: to_device(np.array(rows, np.int64), device) for name, rows in (observe or {}).items()
        }
        tables = HeadTables.of(table, [rows.sequence for rows in batch])
        self._pages, self._lengths = to_device(tables.pages, device), to_device(tables.lengths, device)
        self._singles = next((at for at, rows in enumerate(batch) if rows.stop != at + 1), len(batch))
        self._chunks = None
        if chunks := batch[self._singles :]:
            lengths = tables.lengths[:, self._singles : len(batch)]
            pages = self._pages[:, self._singles : len(batch)]
            self._chunks = _Chunks(table, store, chunks, lengths, pages)

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
        for name, rows in self._observe.items():
            self.observed[name].append(q.index_select(0, rows))
        singles, parts = self._singles, []
        if singles:
            pages, lengths = self._pages[layer, :singles], self._lengths[layer, :singles]
            parts.append(decode_attention(q[:singles], self._store, pages, lengths))
        if self._chunks is not None:
            parts.append(self._chunks.attend(layer, q[singles:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        self._chunks = [_chunk(table, rows, chunks[0].start) for rows in chunks]
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
        tile_rows = _tile_rows(device, self._store.k)
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


def _chunk(table: PageTable, rows: SequenceRows, first: int) -> Chunk:
    """A chunk among those whose packed rows begin with `first`."""
    count = rows.stop - rows.start
    if rows.until is None:
        return Chunk(rows.start - first, count)
    found = segments(table.order(rows.sequence, 0, 0), rows.until, count)
    return Chunk(rows.start - first, count, found)


def _tile_rows(device: torch.device, pages: Tensor) -> int:
    if backend_for(device) == "naive":
        return 128
    from mmserve.kernels.prefill_attention.triton import default_tile_rows

    return default_tile_rows(pages.shape[2], pages.dtype.itemsize)


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
