"""A sequence's KV outside any pool, in the numbers of quantized pages, and how it gets there and back.

Whole pages are quantized, keys by channel; the newest page of each head stays as it is. Knows nothing about
who holds a sequence, nor how an export travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.kernels.kv_codec import QuantizedPages, empty_pages, load_pages, store_pages
from mmserve.kernels.kv_codec.pages import PAGE_TYPES, Kind
from mmserve.kernels.paged_decode.naive_pages import PageScales
from mmserve.kv.store import KVExport, PageStore
from mmserve.kv.table import IntArray, PageTable, SlotArray

KEY_AXIS: Final = "channel"
_KINDS: Final[dict[torch.dtype, Kind]] = {dtype: kind for kind, dtype in PAGE_TYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedExport:
    """As `KVExport`: slots of whole pages, then what is newest in each head; both head after head."""

    lengths: IntArray  # [layers, kv_heads]
    order: IntArray
    position: IntArray
    pages: QuantizedPages
    k: Tensor  # [newest slots, d]
    v: Tensor

    @property
    def kind(self) -> Kind:
        return _KINDS[self.pages.k.dtype]

    @property
    def page_size(self) -> int:
        return self.pages.k.shape[1]

    @property
    def kv_bytes(self) -> int:
        """Of numbers, scales and floats."""
        return sum(tensor.nbytes for tensor in (*parts_of(self.pages).values(), self.k, self.v))


def parts_of(pages: QuantizedPages) -> dict[str, Tensor]:
    """The tensors of pages by name; zeros only where a codec has them."""
    scales = pages.scales
    named = {"k": pages.k, "v": pages.v}
    found = {item.name: getattr(scales, item.name) for item in fields(scales) if item.name != "key_axis"}
    return named | {name: scale for name, scale in found.items() if scale is not None}


def pages_of(parts: Mapping[str, Tensor]) -> QuantizedPages:
    """Undoes `parts_of`."""
    scales = PageScales(
        key_axis=KEY_AXIS,
        k_scale=parts["k_scale"],
        v_scale=parts["v_scale"],
        k_zero=parts.get("k_zero"),
        v_zero=parts.get("v_zero"),
    )
    return QuantizedPages(k=parts["k"], v=parts["v"], scales=scales)


def page_bytes(kind: Kind, page_size: int, head_dim: int) -> int:
    """Bytes of a quantized page, its scales too."""
    one = empty_pages(kind, 1, page_size, head_dim, key_axis=KEY_AXIS)
    return sum(part.nbytes for part in parts_of(one).values())


def whole_pages(lengths: NDArray[np.int32], page_size: int) -> NDArray[np.int32]:
    """How many pages of each head are quantized: all but the newest, be that full or not."""
    return (np.maximum(lengths, 1) - 1) // np.int32(page_size)


def quantized(table: PageTable, store: PageStore, sequence: str, kind: Kind) -> QuantizedExport:
    """What a sequence has in pages of floats."""
    lengths, size = table.lengths(sequence), table.page_size
    whole = whole_pages(lengths, size)
    order, position = table.places(sequence)
    pages = empty_pages(
        kind, int(whole.sum()), size, store.k.shape[2], key_axis=KEY_AXIS, device=store.k.device
    )
    newest: list[tuple[Tensor, Tensor]] = []
    first = 0
    # layer by layer, so that what is between floats and numbers stays small
    for layer in range(table.layers):
        slots, count = table.slots(sequence, layer), int(whole[layer].sum())
        split = whole[layer] * size
        _store(pages, first, count, store, _leading(slots, split))
        first += count
        newest.append(store.read(_between(slots, split, lengths[layer])))
    return QuantizedExport(
        lengths=lengths,
        order=order,
        position=position,
        pages=pages,
        k=torch.cat([k for k, _ in newest]),
        v=torch.cat([v for _, v in newest]),
    )


def quantized_bytes(table: PageTable, store: PageStore, sequence: str, kind: Kind) -> int:
    """`kv_bytes` of `quantized`."""
    lengths, size = table.lengths(sequence), table.page_size
    whole = int(whole_pages(lengths, size).sum())
    newest = int(lengths.sum()) - whole * size
    return whole * page_bytes(kind, size, store.k.shape[2]) + newest * store.page_bytes // size


def restored(export: QuantizedExport) -> KVExport:
    """The same as floats, as well as the codec has kept them."""
    lengths, size, dtype = export.lengths, export.page_size, export.k.dtype
    whole = whole_pages(lengths, size).reshape(-1)
    ids = torch.arange(len(export.pages.k), dtype=torch.int32, device=export.k.device)
    both = []
    for pages, newest in zip(load_pages(export.pages, ids, dtype), (export.k, export.v), strict=True):
        heads = zip(
            pages.split(whole.tolist()),
            newest.split((lengths.reshape(-1) - whole * size).tolist()),
            strict=True,
        )
        both.append(torch.cat([part for page, rest in heads for part in (page.flatten(0, 1), rest)]))
    return KVExport(lengths=lengths, order=export.order, position=export.position, k=both[0], v=both[1])


def _store(pages: QuantizedPages, first: int, count: int, store: PageStore, slots: SlotArray) -> None:
    k, v = store.read(slots.reshape(count, pages.k.shape[1]))
    ids = torch.arange(first, first + count, dtype=torch.int32, device=k.device)
    store_pages(pages, k, v, ids, torch.full_like(ids, pages.k.shape[1]))


def _leading(slots: SlotArray, counts: NDArray[np.int32]) -> SlotArray:
    """The first `counts` slots of every head [heads, n], one after another."""
    return slots[np.arange(slots.shape[1]) < counts[:, None]]


def _between(slots: SlotArray, first: NDArray[np.int32], last: NDArray[np.int32]) -> SlotArray:
    columns = np.arange(slots.shape[1])
    return slots[(columns >= first[:, None]) & (columns < last[:, None])]
