"""Decodes that read only the pages which may matter: Quest's bounds of keys, page by page.

Nothing is evicted, so that the next token may want other pages. Knows nothing about requests or how attention
is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable, SlotArray
from mmserve.pruning.settings import whole

MOST = 2**31 - 1  # slots, more than any sequence has
MIN_PAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(AttentionPattern):
    """Each KV head reads its newest page, and those whose keys could have the largest product with the query.

    The bound is the paper's: with the smallest m and largest M of a page's keys in every channel, no key's
    product with q exceeds sum(max(q m, q M)). What differs: pages are those of the cache (32 slots by
    default, 16 in the paper), the query heads of a KV head read the same pages, by the largest of their
    bounds, and the newest page is always read rather than scored.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "decode_step"

    budget: int = whole(2048, 1, MOST, "how many slots a head reads")
    dense_layers: int = whole(2, 0, 1024, "how many of the first layers read everything")

    @classmethod
    def everything(cls) -> Self:
        return cls(budget=MOST)

    def index(self, view: ChunkView) -> None:
        """Prompts are dense."""


class Selected(NamedTuple):
    """What a decode reads in one layer."""

    pages: Tensor  # int64 [kv_heads, n]: each head's pages in order, filled up with any
    lengths: IntArray  # int32 [kv_heads]: slots on them, all but the last page being full

    def runs(self, page_size: int) -> tuple[SlotArray, IntArray]:
        """Flat slots where each page begins, and how many follow, both [kv_heads, n]."""
        first = self.pages.cpu().numpy() * page_size
        before = np.arange(first.shape[1], dtype=np.int32) * np.int32(page_size)
        return first, np.clip(self.lengths[:, None] - before, 0, page_size)

    def slots(self, page_size: int) -> SlotArray:
        """All flat slots, [kv_heads, n * page_size] padded with -1."""
        first, length = self.runs(page_size)
        inside = np.arange(page_size)
        slots = np.where(inside < length[..., None], first[..., None] + inside, -1)
        return slots.reshape(len(first), -1)


class PageSelection:
    """The bounds of one sequence's pages, kept while it decodes, and what its queries select by them.

    A page's bounds are taken once it is full and no longer the newest. They hold as long as every step adds
    one slot to pages that stay what they are; after anything else they are taken anew.
    """

    def __init__(self, quest: Quest, table: PageTable, store: PageStore, sequence: str) -> None:
        self._quest, self._table, self._store, self._sequence = quest, table, store, sequence
        self._most = max(MIN_PAGES, quest.budget // table.page_size) - 1  # pages besides the newest
        self._version = -1
        self._lengths = np.zeros((table.layers, table.kv_heads), np.int32)
        self._older = np.zeros_like(self._lengths)  # pages before the newest one
        self._pages = np.empty((table.layers, table.kv_heads, 0), np.int32)
        self._bounds: dict[int, _Bounds] = {}

    def begin_step(self) -> None:
        """To be called once a step's slot is appended."""
        lengths, version = self._table.lengths(self._sequence), self._table.version(self._sequence)
        is_next = bool((lengths == self._lengths + 1).all())
        if version != self._version:
            pages, known = self._table.pages(self._sequence).copy(), self._pages
            is_next &= np.array_equal(pages[..., : known.shape[2]], known)
            self._pages, self._version = pages, version
        if not is_next:
            self._bounds.clear()
        self._lengths = lengths
        self._older = np.maximum(lengths - 1, 0) // np.int32(self._table.page_size)

    def select(self, layer: int, q: Tensor) -> Selected | None:
        """The pages of a layer that a row q [q_heads, d] reads, the newest among them; None: all."""
        older, page_size = self._older[layer], self._table.page_size
        if layer < self._quest.dense_layers or int(older.max()) <= self._most:
            return None
        scores = self._bounds_of(layer).scores(q, older)
        # in order; behind them what a head with fewer pages does not have
        best = scores.topk(self._most, sorted=False)
        chosen = best.indices.masked_fill(best.values == -torch.inf, MOST).sort(1).values
        taken = np.minimum(older, self._most)
        newest = torch.from_numpy(np.stack([taken, older]).astype(np.int64)).to(q.device)
        chosen = functional.pad(chosen, (0, 1), value=MOST).scatter(1, newest[0, :, None], newest[1, :, None])
        pages = torch.from_numpy(self._pages[layer]).to(q.device, torch.int64)
        pages = pages.gather(1, chosen.clamp(max=pages.shape[1] - 1)).clamp(min=0)
        rest = self._lengths[layer] - older * page_size
        return Selected(pages, (taken * page_size + rest).astype(np.int32))

    def _bounds_of(self, layer: int) -> _Bounds:
        """Those of all pages before the newest ones."""
        if layer not in self._bounds:
            self._bounds[layer] = _Bounds(self._table.kv_heads, self._store)
        bounds = self._bounds[layer]
        bounds.extend(self._pages[layer], self._older[layer])
        return bounds


class _Bounds:
    """Largest and smallest keys of the first pages of each KV head of a layer, channel by channel."""

    def __init__(self, kv_heads: int, store: PageStore) -> None:
        self._store = store
        self._known = np.zeros(kv_heads, np.int32)  # pages of each head
        # fp32 [kv_heads, room, 2 * d]: the largest, then the smallest
        self._values = torch.empty(kv_heads, 0, 2 * store.k.shape[2], device=store.k.device)

    def extend(self, pages: IntArray, count: IntArray) -> None:
        """Have `count` [kv_heads] of `pages` [kv_heads, n]."""
        missing = int(count.max()) - self._values.shape[1]
        if missing > 0:
            # room for as many again, so that it rarely moves
            self._values = functional.pad(self._values, (0, 0, 0, missing + int(count.max())))
        place = np.arange(int(count.max()))
        head, new = np.nonzero((place >= self._known[:, None]) & (place < count[:, None]))
        if len(new):
            device = self._values.device
            keys = self._store.k[torch.from_numpy(pages[head, new].astype(np.int64)).to(device)]
            bounds = torch.cat([keys.amax(1), keys.amin(1)], 1).float()
            self._values[torch.from_numpy(head).to(device), torch.from_numpy(new).to(device)] = bounds
            self._known = count.copy()

    def scores(self, q: Tensor, count: IntArray) -> Tensor:
        """What no product of a KV head's queries with a key of each page exceeds, -inf for no page.

        q is [q_heads, d]; fp32 [kv_heads, most of `count`].
        """
        grouped = q.float().unflatten(0, (len(count), -1))  # [kv_heads, group, d]
        signed = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], 2)
        most = int(count.max())
        found = (signed @ self._values[:, :most].transpose(1, 2)).amax(1)
        counts = torch.from_numpy(count.astype(np.int64)).to(q.device)
        return found.masked_fill(torch.arange(most, device=q.device) >= counts[:, None], -torch.inf)
