"""Runs plans on the model: packed rows in, logits and KV out. Decides nothing.

A sequence's K/V live in head-owned pages from its first prompt row until `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.engine.plan import Plan
from mmserve.kv.base import KVPolicy, LayerView
from mmserve.kv.store import KVExport, PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder

MAX_OBSERVED = 64  # text queries after the last visual token that KV policies see


@dataclass(slots=True, kw_only=True)
class PromptRows:
    """A prompt ready to run: one row per surviving token.

    `order` is each row's index in the uncompressed prompt, `position` its RoPE position.
    """

    embeddings: Tensor  # [n, D]
    order: NDArray[np.int32]
    position: NDArray[np.int32]
    is_visual: NDArray[np.bool_]
    done: int = 0
    observed: list[list[Tensor]] = field(default_factory=list)  # per chunk, per layer [rows, Hq, d]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def first_observed(self) -> int:
        """The rows from here on are text after the last visual token, at most `MAX_OBSERVED`."""
        visual = np.flatnonzero(self.is_visual)
        after = int(visual[-1]) + 1 if len(visual) else 0
        return max(min(after, len(self) - 1), len(self) - MAX_OBSERVED)


@dataclass(slots=True)
class DecodeRow:
    """The newest token of a running sequence: its id and where it goes."""

    token: int
    order: int
    position: int


class Runner:
    """Model, page table and page store of one language worker."""

    def __init__(
        self, decoder: TextDecoder, table: PageTable, store: PageStore, device: torch.device
    ) -> None:
        self.decoder = decoder
        self.table = table
        self.store = store
        self.device = device
        self.prompts: dict[str, PromptRows] = {}

    def add(self, sequence: str, prompt: PromptRows) -> None:
        self.prompts[sequence] = prompt

    def release(self, sequence: str) -> None:
        """Forget a sequence, whatever it is doing; harmless when it is unknown."""
        self.prompts.pop(sequence, None)
        if sequence in self.table:
            self.table.release(sequence)

    def embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.decoder.embed(torch.as_tensor(ids, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def run(self, plan: Plan, decodes: dict[str, DecodeRow]) -> dict[str, Tensor]:
        """One step. Returns fp32 logits [V] for every decode and every prompt that was completed."""
        pieces: list[Tensor] = []
        positions: list[NDArray[np.int32]] = []
        batch: list[SequenceRows] = []
        observe: dict[str, range] = {}
        start = 0
        for sequence, row in ((name, decodes[name]) for name in plan.decodes):
            order, position = np.array([row.order], np.int32), np.array([row.position], np.int32)
            self.table.append(sequence, order, position)
            positions.append(position)
            batch.append(SequenceRows(sequence, start, start + 1))
            start += 1
        if plan.decodes:
            pieces.append(self.embed([decodes[name].token for name in plan.decodes]))
        for chunk in plan.chunks:
            prompt = self.prompts[chunk.sequence]
            rows = slice(chunk.start, chunk.stop)
            self.table.append(chunk.sequence, prompt.order[rows], prompt.position[rows])
            pieces.append(prompt.embeddings[rows])
            positions.append(prompt.position[rows])
            stop = start + chunk.stop - chunk.start
            batch.append(SequenceRows(chunk.sequence, start, stop))
            first = max(prompt.first_observed, chunk.start)
            observe[chunk.sequence] = range(start + first - chunk.start, stop)
            start = stop
        attention = PagedAttention(
            self.table, self.store, batch, {k: v for k, v in observe.items() if len(v)}
        )
        where = torch.from_numpy(np.concatenate(positions)).to(self.device)
        hidden = self.decoder(torch.cat(pieces), where, attention.attend)
        return self._logits(plan, batch, hidden, attention)

    def _logits(
        self, plan: Plan, batch: list[SequenceRows], hidden: Tensor, attention: PagedAttention
    ) -> dict[str, Tensor]:
        finished = list(plan.decodes)
        for chunk in plan.chunks:
            prompt = self.prompts[chunk.sequence]
            prompt.done = chunk.stop
            if chunk.sequence in attention.observed:
                prompt.observed.append(attention.observed[chunk.sequence])
            if prompt.done == len(prompt):
                finished.append(chunk.sequence)
        last = {rows.sequence: rows.stop - 1 for rows in batch}
        if not finished:
            return {}
        logits = self.decoder.logits(hidden[[last[name] for name in finished]])
        return dict(zip(finished, logits, strict=True))

    @torch.inference_mode()
    def compress(self, sequence: str, policy: KVPolicy, budget: float) -> None:
        """Let a policy choose what every head keeps of a prefilled prompt, and free the rest."""
        prompt = self.prompts[sequence]
        first = prompt.first_observed
        visual, order = torch.from_numpy(prompt.is_visual), torch.from_numpy(prompt.order)
        for layer in range(self.table.layers):
            keys, values = self.store.read(self.table.slots(sequence, layer))
            view = LayerView(
                layer=layer,
                queries=torch.cat([chunk[layer] for chunk in prompt.observed]),
                query_order=order[first:],
                keys=keys,
                values=values,
                visual=visual,
                order=order,
                budget=budget,
            )
            for head, kept in enumerate(policy.select(view)):
                self.store.copy(*self.table.keep(sequence, layer, head, kept))

    def finish_prompt(self, sequence: str) -> None:
        """The prompt's rows are no longer needed, its pages stay."""
        del self.prompts[sequence]

    def export(self, sequence: str) -> KVExport:
        return self.store.export(self.table, sequence)

    def kv_bytes(self, sequence: str) -> int:
        """Bytes of K and V in the slots a sequence holds, over all layers and heads."""
        slots = int(self.table.lengths(sequence).sum())
        return slots * self.store.page_bytes // self.table.page_size
