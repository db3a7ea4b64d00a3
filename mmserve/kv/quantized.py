"""Pages of running answers in int8, int4 or fp8, and the newest page of each head as floats.

Keys share a scale per page and channel, so a page is quantized when it is full and the next one begins, as
KIVI's residual. Knows nothing about requests or attention.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmserve.errors import WireError
from mmserve.kernels.kv_codec import QuantizedPages, empty_pages, store_pages
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kv.codec import (
    KEY_AXIS,
    QuantizedExport,
    page_bytes,
    pages_of,
    parts_of,
    quantized,
    restored,
    whole_pages,
)
from mmserve.kv.store import KVExport, PageStore, check_rows, zeros
from mmserve.kv.store import page_bytes as float_page_bytes
from mmserve.kv.table import IntArray, OutOfPages, PageTable, SlotArray

# memory is shared out for sequences of so many before a KV policy: if there is none, newest pages take 3.4 %
# of it at most in int4
SHORT_SLOTS = 3072


class QuantizedStore:
    """Sequences of quantized pages. `places` of them may be here, since each has newest pages of its own.

    All but the newest page of a head lie in `pages`, where `table` says; the newest one, full or not, lies in
    `newest` at the place of its sequence, and its page in `pages` waits for it. Writing is `append`, then K
    and V into `newest` at `newest_slots`.
    """

    def __init__(
        self,
        kind: Kind,
        table: PageTable,
        places: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.kind = kind
        self.table = table
        self.places = places
        self._heads = table.layers * table.kv_heads
        self.pages = _zero_pages(kind, table.num_pages, table.page_size, head_dim, device)
        self.newest = PageStore(places * self._heads, table.page_size, head_dim, dtype, device)
        self.page_bytes = page_bytes(kind, table.page_size, head_dim)
        self._free = list(range(places))[::-1]
        self._place: dict[str, int] = {}

    @property
    def free_places(self) -> int:
        return len(self._free)

    # coming and going

    def import_(self, sequence: str, export: QuantizedExport | KVExport, headroom: int) -> None:
        """Create a sequence, or fill one that has only reserved pages, with room for `headroom` slots more.

        What another codec has written is converted. Raises OutOfPages or WireError.
        """
        table = self.table
        check_rows(table, export.lengths, export.order, export.position)
        if not isinstance(export, QuantizedExport) or (export.kind, export.page_size) != self._layout:
            export = self._converted(export)
        _check_parts(export, self.newest.k.shape[2])
        if sequence in table:
            assert not table.lengths(sequence).any(), f"sequence {sequence} is here"
            table.release(sequence)
        if not self._free:
            raise OutOfPages(f"Expected a place of {self.places} for the newest pages, but got none")
        if table.pages_for(int(export.lengths.max(initial=0)) + headroom) > table.free_pages:
            raise OutOfPages(f"Expected {table.free_pages} free KV pages to be enough for a sequence")
        table.restore(sequence, export.lengths, export.order, export.position)
        self._place[sequence] = self._free.pop()
        self._fill(sequence, export)
        table.reserve(sequence, headroom)

    def _converted(self, export: QuantizedExport | KVExport) -> QuantizedExport:
        floats = restored(export) if isinstance(export, QuantizedExport) else export
        layers, heads = floats.lengths.shape
        size = self.table.page_size
        count = int((-(-floats.lengths // size)).sum())
        table = PageTable(layers, heads, count, size, self.table.axes)
        store = PageStore(count, size, floats.k.shape[1], self.newest.k.dtype, str(self.newest.k.device))
        store.import_(table, "", floats)
        return quantized(table, store, "", self.kind)

    @property
    def _layout(self) -> tuple[Kind, int]:
        return self.kind, self.table.page_size

    def _fill(self, sequence: str, export: QuantizedExport) -> None:
        there, newest = self._where(sequence)
        device = self.newest.k.device
        for mine, theirs in zip(parts_of(self.pages).values(), parts_of(export.pages).values(), strict=True):
            mine[there] = theirs.to(device)
        self.newest.write(newest, export.k.to(device), export.v.to(device))

    def export(self, sequence: str) -> QuantizedExport:
        """A copy of everything a sequence has."""
        there, newest = self._where(sequence)
        k, v = self.newest.read(newest)
        order, position = self.table.places(sequence)
        return QuantizedExport(
            lengths=self.table.lengths(sequence),
            order=order,
            position=position,
            pages=pages_of({name: part[there] for name, part in parts_of(self.pages).items()}),
            k=k,
            v=v,
        )

    def _where(self, sequence: str) -> tuple[Tensor, SlotArray]:
        """Its quantized pages, and the slots of `newest` that it uses, both head after head."""
        pages, size = self.table.pages(sequence), self.table.page_size
        whole = whole_pages(self.table.lengths(sequence), size)
        ids = pages[np.arange(pages.shape[2]) < whole[..., None]].astype(np.int64)
        slots = self.newest_pages(sequence)[..., None].astype(np.int64) * size + np.arange(size)
        newest = slots[np.arange(size) < self.newest_lengths(sequence)[..., None]]
        return torch.from_numpy(ids).to(self.newest.k.device), newest

    def release(self, sequence: str) -> None:
        """Forget a sequence; harmless when it is unknown."""
        if sequence in self.table:
            self.table.release(sequence)
        if sequence in self._place:
            self._free.append(self._place.pop(sequence))

    # growing

    def append(self, sequence: str, order: IntArray, position: IntArray) -> None:
        """One more slot in every head; where its newest page is full, that page is quantized first."""
        lengths, size = self.table.lengths(sequence), self.table.page_size
        is_full = (lengths % size == 0) & (lengths > 0)
        if is_full.any():
            last = lengths // size - 1
            pages = np.take_along_axis(self.table.pages(sequence), last[..., None].clip(0), 2)[..., 0]
            self._quantize(pages[is_full], self.newest_pages(sequence)[is_full])
        self.table.append(sequence, order, position)

    def _quantize(self, pages: IntArray, newest: IntArray) -> None:
        device = self.newest.k.device
        ids = torch.from_numpy(pages.astype(np.int32)).to(device)
        rows = torch.from_numpy(newest.astype(np.int64)).to(device)
        full = torch.full_like(ids, self.table.page_size)
        store_pages(self.pages, self.newest.k[rows], self.newest.v[rows], ids, full)

    # reading

    def newest_slots(self, sequence: str) -> SlotArray:
        """Where in `newest` the last slot of every head lies, int64 [layers, kv_heads]."""
        size = self.table.page_size
        last = (self.table.lengths(sequence) - 1) % size
        return self.newest_pages(sequence).astype(np.int64) * size + last

    def newest_lengths(self, sequence: str) -> IntArray:
        """How many slots of every head are in `newest`, int32 [layers, kv_heads]."""
        lengths = self.table.lengths(sequence)
        return lengths - whole_pages(lengths, self.table.page_size) * np.int32(self.table.page_size)

    def newest_pages(self, sequence: str) -> IntArray:
        """The page of `newest` of every head, int32 [layers, kv_heads]."""
        shape = (self.table.layers, self.table.kv_heads)
        first = self._place[sequence] * self._heads
        return np.arange(first, first + self._heads, dtype=np.int32).reshape(shape)


def places_and_pages(
    memory: int,
    most: int,
    kind: Kind,
    heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    kept: float = 1.0,
) -> tuple[int, int]:
    """How many sequences, `most` at most, and how many quantized pages fit into so many bytes.

    There are newest pages for as many as there would be of `SHORT_SLOTS` slots each, a share of them `kept`.
    """
    page = page_bytes(kind, page_size, head_dim)
    newest = float_page_bytes(page_size=page_size, head_dim=head_dim, dtype=dtype)
    short = heads * (math.ceil(kept * SHORT_SLOTS / page_size) * page + newest)
    places = max(min(memory // short, most), 1)
    return places, max((memory - places * heads * newest) // page, 0)


def _zero_pages(kind: Kind, pages: int, page_size: int, head_dim: int, device: str) -> QuantizedPages:
    like = empty_pages(kind, 1, page_size, head_dim, key_axis=KEY_AXIS)
    return pages_of(
        {name: zeros((pages, *part.shape[1:]), part.dtype, device) for name, part in parts_of(like).items()}
    )


def _check_parts(export: QuantizedExport, head_dim: int) -> None:
    whole = whole_pages(export.lengths, export.page_size)
    newest = int((export.lengths - whole * export.page_size).sum())
    like = empty_pages(export.kind, 1, export.page_size, head_dim, key_axis=KEY_AXIS)
    parts = parts_of(export.pages)
    for name, part in parts_of(like).items():
        expected = (int(whole.sum()), *part.shape[1:])
        if name not in parts or parts[name].shape != expected or parts[name].dtype is not part.dtype:
            raise WireError(f"Expected {name} of quantized pages of shape {expected}, but got another")
    if export.k.shape != (newest, head_dim) or export.v.shape != (newest, head_dim):
        raise WireError(f"Expected {newest} newest keys and values, but got {tuple(export.k.shape)}")
