"""The pages of one language worker: its table, their contents and the prefix cache.

Knows nothing about the model, plans or how a step is run.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kv.codec import QuantizedExport, quantized, quantized_bytes, restored
from mmserve.kv.identity import Identity
from mmserve.kv.prefix import PrefixCache
from mmserve.kv.store import KVExport, PageStore, page_bytes
from mmserve.kv.table import PageTable

MAX_RUNNING = 64  # sequences


class WorkerPages:
    """Prompts and answers in one kind of pages, of floats. `places` sequences may run.

    `codec` is what KV is quantized with before it travels; None leaves it as it is.
    """

    has_answer_pages: ClassVar[bool] = False  # answers have pages of their own

    def __init__(
        self, table: PageTable, store: PageStore, dtype: torch.dtype, codec: Kind | None = None
    ) -> None:
        self.table = table
        self.store = store
        self.prefix = PrefixCache(table, table.num_pages, store.page_bytes)
        self.codec = codec
        self.places = MAX_RUNNING
        self._dtype = dtype  # of the model

    @property
    def available_pages(self) -> int:
        """Pages that are free, or only remembered."""
        return self.table.free_pages + self.prefix.evictable_pages

    @property
    def offered_pages(self) -> int:
        """Pages that a request may count on, wherever it needs them; `most_pages` when nothing runs."""
        return self.available_pages

    @property
    def most_pages(self) -> int:
        return self.table.num_pages

    @property
    def answers(self) -> PageTable:
        """Where running answers have their pages."""
        return self.table

    @property
    def available_answer_pages(self) -> int:
        return self.available_pages

    def answer_pages_freed_by(self, sequence: str) -> int:
        return self.pages_freed_by(sequence)

    def prompt_pages(self, slots: int, headroom: int) -> tuple[int, int]:
        """What a prompt takes of the pages of prompts, and of those that are for answers alone."""
        return self.table.pages_for(slots + headroom), 0

    def pages_freed_by(self, sequence: str) -> int:
        """Pages that no other sequence holds: without this one they are free, or only remembered."""
        pages = self.table.pages(sequence)
        pages = pages[pages >= 0]
        return int((self.table.owners(pages) - self.prefix.holds(pages) == 1).sum())

    def cached(self, identity: Identity | None, most: int) -> tuple[int, int]:
        """Leading slots whose KV is there, `most` at most, and those of its pages that are in use anyway."""
        if identity is None:
            return 0, 0
        found = self.prefix.match(identity, most)
        return found, self.prefix.busy_pages(identity, found)

    def reserve(self, sequence: str, slots: int) -> None:
        """Own pages for `slots` more slots, at the expense of what is only remembered."""
        self._make_room(self.table.missing_pages(sequence, slots))
        self.table.reserve(sequence, slots)

    def _make_room(self, pages: int) -> None:
        short = pages - self.table.free_pages
        if short > 0:
            self.prefix.evict(short)

    # when a prompt is over

    def remember(self, sequence: str, identity: Identity) -> None:
        """Let later prompts share the KV of a sequence, whose slots are those of `identity`."""
        self.prefix.insert(sequence, identity, len(identity.rows))

    def hold(self, sequence: str, headroom: int) -> None:
        """A prompt is over and its answer runs here, with pages for so many tokens."""
        self.reserve(sequence, headroom)

    def import_(self, sequence: str, export: KVExport | QuantizedExport, headroom: int) -> None:
        """Create a sequence from KV that was computed elsewhere, with pages for `headroom` tokens more."""
        export = restored(export) if isinstance(export, QuantizedExport) else export
        self._make_room(self.table.pages_for(int(export.lengths.max(initial=0)) + headroom))
        self.store.import_(self.table, sequence, export)
        self.reserve(sequence, headroom)

    def export(self, sequence: str) -> KVExport | QuantizedExport:
        if self.codec is not None:
            return quantized(self.table, self.store, sequence, self.codec)
        return self.store.export(self.table, sequence)

    def kv_bytes(self, sequence: str) -> int:
        """Bytes of K and V in the slots of a prompt that is over, as they will be kept."""
        if self.codec is not None:
            return quantized_bytes(self.table, self.store, sequence, self.codec)
        slots = int(self.table.lengths(sequence).sum())
        return slots * self.store.page_bytes // self.table.page_size

    def kv_bytes_of(self, rows: int) -> int:
        """Bytes of so many rows that are in all layers and heads, in the model's type."""
        slots = rows * self.table.layers * self.table.kv_heads
        return slots * page_bytes(page_size=1, head_dim=self.store.k.shape[2], dtype=self._dtype)
