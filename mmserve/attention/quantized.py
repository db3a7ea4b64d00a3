"""Attention of steps whose answers lie in quantized pages: decodes, beside prompts in pages of floats.

Knows nothing about models or requests, nor how numbers are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.cpu import joined_runs
from mmserve.attention.cuda import CudaAttention, HeadTables, append, page_attention, to_device
from mmserve.attention.paged import PagedAttention
from mmserve.kernels.merge_lse import merge_lse
from mmserve.kernels.paged_decode.cpu_quantized import paged_decode_quantized
from mmserve.kv.codec import whole_pages
from mmserve.kv.quantized import QuantizedStore
from mmserve.kv.sequence import Runs
from mmserve.models.fused import Rotation


class Decoding(Protocol):
    """Attention of one row per sequence, whose K and V are among the newest already."""

    is_fused: ClassVar[bool]

    def __init__(self, store: QuantizedStore, sequences: Sequence[str]) -> None: ...

    def attend(self, layer: int, q: Tensor) -> Tensor: ...


class QuantizedAttention:
    """The first rows of the packed batch are those of `sequences`, one each; the others are `beside`'s.

    The rows of `beside` are numbered from 0 on.
    """

    def __init__(
        self,
        store: QuantizedStore,
        sequences: Sequence[str],
        beside: PagedAttention | None,
        decoding: type[Decoding],
    ) -> None:
        self._store, self._count, self._beside = store, len(sequences), beside
        self.observed: dict[str, list[Tensor]] = {} if beside is None else beside.observed
        slots = np.stack([store.newest_slots(name) for name in sequences], axis=2)
        self._slots = to_device(slots, store.newest.k.device)  # [layers, kv_heads, rows]
        self._decoding = decoding(store, sequences)
        self.is_fused = self._decoding.is_fused

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `PagedAttention.attend`."""
        count = self._count
        self._store.newest.write(self._slots[layer], *(rows[:count].transpose(0, 1) for rows in (k, v)))
        out = self._decoding.attend(layer, q[:count].contiguous())
        if self._beside is None:
            return out
        return torch.cat([out, self._beside.attend(layer, q[count:], k[count:], v[count:])])

    def tap(self, inputs: Tensor) -> None:
        """As `PagedAttention.tap`."""
        if self._beside is not None:
            self._beside.tap(inputs[self._count :])

    def attend_products(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """As `CudaAttention.attend_products`."""
        count, positions = self._count, rotation.positions
        first, rest = (rotation._replace(positions=part) for part in (positions[:count], positions[count:]))
        q = append(qkv[:count], first, self._slots[layer], self._store.newest)
        out = self._decoding.attend(layer, q)
        if self._beside is None:
            return out
        assert isinstance(self._beside, CudaAttention), "products are for a GPU"
        return torch.cat([out, self._beside.attend_products(layer, qkv[count:], rest)])


class CpuDecoding:
    """Runs of quantized pages and of the newest ones, read where they lie."""

    is_fused: ClassVar[bool] = False

    def __init__(self, store: QuantizedStore, sequences: Sequence[str]) -> None:
        self._store = store
        self._runs = joined_runs([_runs(store, name) for name in sequences])

    def attend(self, layer: int, q: Tensor) -> Tensor:
        pages, newest, runs, width = self._store.pages, self._store.newest, self._runs, q.shape[-1]
        return paged_decode_quantized(
            q,
            pages.k,
            pages.v,
            pages.scales,
            newest.k.view(-1, width),
            newest.v.view(-1, width),
            runs.first[layer],
            runs.length[layer],
            runs.begin,
            scale=width**-0.5,
        )


def _runs(store: QuantizedStore, sequence: str) -> Runs:
    """Where the slots of every head lie, those of the newest pages behind all quantized ones."""
    table = store.table
    first, length = table.runs(sequence)
    whole = whole_pages(table.lengths(sequence), table.page_size) * np.int32(table.page_size)
    before = np.cumsum(length, axis=0, dtype=np.int32) - length
    behind = table.num_pages * table.page_size
    newest = store.newest_pages(sequence).astype(np.int64) * table.page_size + behind
    return Runs(
        np.concatenate([first, newest[None]]),
        np.concatenate([np.clip(whole - before, 0, length), store.newest_lengths(sequence)[None]]),
    )


class PageDecoding:
    """By page tables: the quantized pages, then the newest ones, then both together."""

    is_fused: ClassVar[bool] = True

    def __init__(self, store: QuantizedStore, sequences: Sequence[str]) -> None:
        self._store, table = store, store.table
        device, self._count = store.newest.k.device, len(sequences)
        tables = HeadTables.of(table, sequences)
        whole = whole_pages(tables.lengths, table.page_size) * np.int32(table.page_size)
        newest = np.zeros((*tables.lengths.shape, 1), np.int32)
        for row, name in enumerate(sequences):
            newest[:, row, :, 0] = store.newest_pages(name)
        self._pages, self._whole = to_device(tables.pages, device), to_device(whole, device)
        self._newest = to_device(newest, device)
        self._rest = to_device(tables.lengths - whole, device)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        pages, newest, rows = self._store.pages, self._store.newest, slice(self._count)
        old = page_attention(
            q, pages.k, pages.v, self._pages[layer, rows], self._whole[layer, rows], scales=pages.scales
        )
        new = page_attention(q, newest.k, newest.v, self._newest[layer, rows], self._rest[layer, rows])
        return merge_lse(torch.stack([old.out, new.out]), torch.stack([old.lse, new.lse])).out
