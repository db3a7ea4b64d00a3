"""A runner whose answers lie in quantized pages: prompts are computed in pages of floats, if any run here.

Decides nothing, as `Runner`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mmserve.attention.backend import decoding_for
from mmserve.attention.paged import PagedAttention
from mmserve.attention.quantized import QuantizedAttention
from mmserve.engine.batch import Batch
from mmserve.engine.pages import MAX_RUNNING
from mmserve.engine.rows import PromptRows
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Plan
from mmserve.kv.codec import QuantizedExport
from mmserve.kv.identity import Identity
from mmserve.kv.quantized import QuantizedStore
from mmserve.kv.store import KVExport, PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder


class QuantizedRunner(Runner):
    """A prompt that runs here has quantized pages for all of its slots from the beginning.

    So there is room when it is over. `table` and `store` are of floats; on a worker that only decodes they
    have no pages.
    """

    has_answer_pages = True

    def __init__(
        self,
        decoder: TextDecoder,
        table: PageTable,
        store: PageStore,
        device: torch.device,
        quantized: QuantizedStore,
    ) -> None:
        super().__init__(decoder, table, store, device, quantized.kind)
        self.quantized = quantized
        self.places = min(MAX_RUNNING, quantized.places)
        # what a graph has captured reads pages of floats
        self.graphs = None
        self._decoding = decoding_for(device)

    @property
    def offered_pages(self) -> int:
        runs_prompts = self.table.num_pages > 0
        return min(self.available_pages, self.answers.free_pages) if runs_prompts else self.answers.free_pages

    @property
    def most_pages(self) -> int:
        return min(self.table.num_pages or self.answers.num_pages, self.answers.num_pages)

    @property
    def answers(self) -> PageTable:
        return self.quantized.table

    @property
    def available_answer_pages(self) -> int:
        return self.answers.free_pages

    def answer_pages_freed_by(self, sequence: str) -> int:
        pages = self.answers.pages(sequence)
        return int((pages >= 0).sum())

    def prompt_pages(self, slots: int, headroom: int) -> tuple[int, int]:
        return self.table.pages_for(slots), self.answers.pages_for(slots + headroom)

    def pages_freed_by(self, sequence: str) -> int:
        return super().pages_freed_by(sequence) if sequence in self.table else 0

    def add(
        self,
        sequence: str,
        prompt: PromptRows,
        *,
        headroom: int = 0,
        identity: Identity | None = None,
        most_cached: int = 0,
    ) -> None:
        super().add(sequence, prompt, identity=identity, most_cached=most_cached)
        self.answers.reserve(sequence, prompt.slots + headroom)

    def reserve(self, sequence: str, slots: int) -> None:
        if sequence in self.answers:
            self.answers.reserve(sequence, slots)
        else:
            super().reserve(sequence, slots)

    def release(self, sequence: str) -> None:
        super().release(sequence)
        self.quantized.release(sequence)

    def hold(self, sequence: str, headroom: int) -> None:
        export = self.export(sequence)
        self.table.release(sequence)
        self.quantized.import_(sequence, export, headroom)

    def import_(self, sequence: str, export: KVExport | QuantizedExport, headroom: int) -> None:
        self.quantized.import_(sequence, export, headroom)

    def _append(self, sequence: str, order: NDArray[np.int32], position: NDArray[np.int32]) -> None:
        self.quantized.append(sequence, order, position)

    def _attention(
        self, plan: Plan, batch: Batch, layers: range | None
    ) -> PagedAttention | QuantizedAttention:
        count = len(plan.decodes)
        if count == 0:
            return super()._attention(plan, batch, layers)
        beside = None
        if plan.chunks:
            beside = self.attention(
                self.table,
                self.store,
                [
                    rows._replace(start=rows.start - count, stop=rows.stop - count)
                    for rows in batch.rows[count:]
                ],
                {name: _behind(rows, count) for name, rows in batch.observe.items()},
                layers,
                [watch._replace(rows=_behind(watch.rows, count)) for watch in batch.watch],
            )
        return QuantizedAttention(self.quantized, plan.decodes, beside, self._decoding)


def _behind(rows: range, count: int) -> range:
    return range(rows.start - count, rows.stop - count)
