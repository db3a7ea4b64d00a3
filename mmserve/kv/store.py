"""The contents of KV pages: one K and one V tensor for all layers, heads and sequences.

Addressed by the flat slots of `PageTable`. Knows nothing about attention; how an export travels to
another process is not its business either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmserve.errors import WireError
from mmserve.kv.table import IntArray, PageTable, SlotArray, Turns
from mmserve.models.rope import rope_angles, rotate

CACHE_LINE = 64  # bytes


def page_bytes(*, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a page: K and V of `page_size` slots of one head."""
    return 2 * page_size * head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KVExport:
    """A sequence's KV outside any pool; everything but `lengths` is head after head, layer after layer.

    `order` and `position` are of one head where all heads are alike.
    """

    lengths: IntArray  # [layers, kv_heads]
    order: IntArray  # [total] or [one head]
    position: IntArray  # the same, or with a second axis of `axes`
    k: Tensor  # [total, d]
    v: Tensor  # [total, d]

    @property
    def kv_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class PageStore:
    """K and V of a pool of pages, each [num_pages, page_size, head_dim]. Slots are int64 of any shape."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.page_size = page_size
        shape = (num_pages, page_size, head_dim)
        self.k, self.v = zeros(shape, dtype, device), zeros(shape, dtype, device)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return page_bytes(page_size=self.page_size, head_dim=self.k.shape[2], dtype=self.k.dtype)

    def write(self, slots: SlotArray | Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [..., d] into slots [...]; no slot may appear twice."""
        flat = self._tensor(slots).reshape(-1)
        width = self.k.shape[-1]
        for pages, rows in ((self.k, k), (self.v, v)):
            pages.view(-1, width)[flat] = rows.reshape(-1, width).to(pages.dtype)

    def read(self, slots: SlotArray | Tensor) -> tuple[Tensor, Tensor]:
        """K and V [..., d] of slots [...], in the store's dtype."""
        index = self._tensor(slots)
        flat = index.reshape(-1)
        k, v = (pages.view(-1, pages.shape[-1]).index_select(0, flat) for pages in (self.k, self.v))
        shape = (*index.shape, self.k.shape[-1])
        return k.view(shape), v.view(shape)

    def copy(self, source: SlotArray | Tensor, destination: SlotArray | Tensor) -> None:
        """Copy slots; a destination may be another's source."""
        self.write(destination, *self.read(source))

    def rerotate(self, turns: Turns, frequencies: Tensor) -> None:
        """Copy slots, keys turned by `delta` positions. `frequencies` are the model's, [d / 2].

        Turning all axes of a position alike is turning one: the keys need not be of one axis.
        """
        k, v = self.read(turns.source)
        delta = torch.from_numpy(turns.delta).to(k.device)
        cos, sin = rope_angles(delta, frequencies.to(k.device), torch.float32)
        self.write(turns.destination, rotate(k.float()[:, None], cos, sin), v)

    def export(self, table: PageTable, sequence: str) -> KVExport:
        """Everything a sequence has, as plain arrays."""
        rows = [table.slots(sequence, layer) for layer in range(table.layers)]
        k, v = self.read(np.concatenate([row[row >= 0] for row in rows]))
        order, position = table.places(sequence)
        return KVExport(
            lengths=table.lengths(sequence),
            order=order,
            position=position,
            k=k,
            v=v,
        )

    def import_(self, table: PageTable, sequence: str, export: KVExport) -> None:
        """Create `sequence` from an export; raises OutOfPages, or WireError when its parts do not fit."""
        total = check_rows(table, export.lengths, export.order, export.position)
        expected = (total, self.k.shape[-1])
        if export.k.shape != expected or export.v.shape != expected:
            raise WireError(f"Expected keys and values of shape {expected}, but got {tuple(export.k.shape)}")
        slots = table.restore(sequence, export.lengths, export.order, export.position)
        self.write(slots, export.k.to(self.k.device), export.v.to(self.v.device))

    def _tensor(self, slots: SlotArray | Tensor) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(slots)) if isinstance(slots, np.ndarray) else slots
        return tensor.to(self.k.device)


def check_rows(table: PageTable, lengths: IntArray, order: IntArray, position: IntArray) -> int:
    """How many slots an export has; raises WireError when its parts do not fit a table."""
    heads = (table.layers, table.kv_heads)
    if lengths.shape != heads or (lengths < 0).any():
        raise WireError(f"Expected KV lengths of shape {heads}, none negative, but got {lengths.shape}")
    total = int(lengths.sum(dtype=np.int64))
    rows, axes = order.shape[:1], () if table.axes == 1 else (table.axes,)
    is_fitting = rows == (total,) or (order.ndim == 1 and bool((lengths == rows).all()))
    if not is_fitting or order.shape != rows or position.shape != (*rows, *axes):
        raise WireError(f"Expected order and position of {total} KV slots, but got {order.shape}")
    return total


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """What was never written must be finite.

    On a CPU through numpy, which leaves it to the system to hand out memory when it is first written, and
    asks for large pages; torch fills it at once.
    """
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
