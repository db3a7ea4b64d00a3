"""Runs plans on the model: packed rows in, logits and KV out. Decides nothing.

A sequence's K/V live in head-owned pages from its first prompt row until `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.backend import attention_for
from mmserve.attention.cuda import CudaAttention, to_device
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.engine.graphs import MAX_ROWS, DecodeGraphs
from mmserve.engine.scheduler import Plan
from mmserve.kernels.dispatch import backend_for
from mmserve.kv.base import KVPolicy, LayerView
from mmserve.kv.identity import Identity
from mmserve.kv.prefix import PrefixCache
from mmserve.kv.store import KVExport, PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import fused_forward

MAX_OBSERVED = 64  # text queries after the last visual token that KV policies see


@dataclass(slots=True, kw_only=True)
class PromptRows:
    """A prompt to run: one row per surviving token; until it `is_whole`, as far as it is known.

    `order` is each row's index in the uncompressed prompt, `position` its RoPE position.
    """

    embeddings: Tensor  # [n or more, D]
    order: NDArray[np.int32]
    position: NDArray[np.int32]
    is_visual: NDArray[np.bool_]
    is_whole: bool = True
    is_observed: bool = False  # keep the queries that a KV policy wants to see
    wants_logits: bool = False  # of every row
    done: int = 0
    cached: int = 0  # rows whose KV was there already
    observed: list[list[Tensor]] = field(default_factory=list)  # per chunk, per layer [rows, Hq, d]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def ready(self) -> int:
        return rows_ready(len(self), is_whole=self.is_whole, is_observed=self.is_observed)

    @property
    def first_observed(self) -> int:
        return first_observed(self.is_visual)


def rows_ready(known: int, *, is_whole: bool, is_observed: bool) -> int:
    """How many leading rows of a prompt may be run.

    While more can come, those are kept back that may turn out to be observed, and one at least, since the
    last row is what the first token is drawn from.
    """
    if is_whole:
        return known
    return max(known - (MAX_OBSERVED if is_observed else 1), 0)


def first_observed(is_visual: NDArray[np.bool_]) -> int:
    """The rows from here on are text after the last visual token, at most `MAX_OBSERVED`."""
    visual = np.flatnonzero(is_visual)
    after = int(visual[-1]) + 1 if len(visual) else 0
    return max(min(after, len(is_visual) - 1), len(is_visual) - MAX_OBSERVED)


def most_cached(is_visual: NDArray[np.bool_], *, is_observed: bool) -> int:
    """How many leading rows may come from the cache; the others are needed for what they compute."""
    return first_observed(is_visual) if is_observed else len(is_visual) - 1


@dataclass(slots=True)
class DecodeRow:
    """The newest token of a running sequence: its id and where it goes."""

    token: int
    order: int
    position: int


class StepResult(NamedTuple):
    """What a step computed: one row of fp32 logits per name, decodes first, then completed prompts."""

    names: tuple[str, ...]
    logits: Tensor  # [names, V]
    prompt_hidden: dict[str, Tensor]  # of a chunk's rows [rows, D], for prompts that want their logits


class _Batch(NamedTuple):
    """The packed rows of one step: those of `tokens`, then `pieces` of prompts."""

    tokens: list[int]
    pieces: list[Tensor]
    positions: list[NDArray[np.int32]]
    rows: list[SequenceRows]
    observe: dict[str, range]


class Runner:
    """Model, page table, page store and prefix cache of one language worker."""

    def __init__(
        self, decoder: TextDecoder, table: PageTable, store: PageStore, device: torch.device
    ) -> None:
        self.decoder = decoder
        self.table = table
        self.store = store
        self.prefix = PrefixCache(table, table.num_pages, store.page_bytes)
        self.device = device
        self.prompts: dict[str, PromptRows] = {}
        # for steps of decodes alone, where a launch costs more than what it does
        can_capture = device.type == "cuda" and backend_for(device) == "triton"
        self.graphs = DecodeGraphs(decoder, table, store) if can_capture else None
        self.attention = attention_for(device)

    # pages

    @property
    def available_pages(self) -> int:
        """Pages that are free, or only remembered."""
        return self.table.free_pages + self.prefix.evictable_pages

    def pages_freed_by(self, sequence: str) -> int:
        """Pages that no other sequence holds: without this one they are free, or only remembered."""
        pages = self.table.pages(sequence)
        pages = pages[pages >= 0]
        return int((self.table.owners(pages) - self.prefix.holds(pages) == 1).sum())

    def cached(self, identity: Identity | None, most: int) -> tuple[int, int]:
        """Leading rows whose KV is there, `most` at most, and those of its pages that are in use anyway."""
        if identity is None:
            return 0, 0
        found = self.prefix.match(identity, most)
        return found, self.prefix.busy_pages(identity, found)

    def add(
        self,
        sequence: str,
        prompt: PromptRows,
        *,
        headroom: int = 0,
        identity: Identity | None = None,
        most_cached: int = 0,
    ) -> None:
        """Take what the prefix cache has, and pages for all other rows and `headroom` tokens after them."""
        self.prompts[sequence] = prompt
        if identity is not None and (found := self.prefix.match(identity, most_cached)):
            self.prefix.take(sequence, identity, found)
            prompt.done = prompt.cached = found
        self.reserve(sequence, len(prompt.embeddings) - prompt.cached + headroom)

    def reserve(self, sequence: str, slots: int) -> None:
        """Own pages for `slots` more slots, at the expense of what is only remembered."""
        self._make_room(self.table.missing_pages(sequence, slots))
        self.table.reserve(sequence, slots)

    def _make_room(self, pages: int) -> None:
        short = pages - self.table.free_pages
        if short > 0:
            self.prefix.evict(short)

    def release(self, sequence: str) -> None:
        """Forget a sequence, whatever it is doing; harmless when it is unknown."""
        self.prompts.pop(sequence, None)
        if sequence in self.table:
            self.table.release(sequence)

    # steps

    def new_rows(self, count: int) -> Tensor:
        """Room for the embeddings [count, D] of a prompt."""
        weight = self.decoder.embed_tokens.weight
        return weight.new_empty(count, weight.shape[1], requires_grad=False)

    def embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.decoder.embed(to_device(np.asarray(ids, np.int64), self.device))

    @torch.inference_mode()
    def run(self, plan: Plan, decodes: dict[str, DecodeRow]) -> StepResult:
        """One step of every decode and chunk of the plan."""
        batch = self._batch(plan, decodes)
        positions = np.concatenate(batch.positions)
        if self.graphs is not None and not plan.chunks and len(plan.decodes) <= MAX_ROWS:
            return StepResult(plan.decodes, self.graphs.run(plan.decodes, batch.tokens, positions), {})
        attention = self.attention(self.table, self.store, batch.rows, batch.observe)
        decoding = [self.embed(batch.tokens)] if batch.tokens else []
        rows, where = torch.cat([*decoding, *batch.pieces]), to_device(positions, self.device)
        if isinstance(attention, CudaAttention):
            hidden = fused_forward(self.decoder, rows, where, attention.attend_products)
        else:
            hidden = self.decoder(rows, where, attention.attend)
        return self._result(plan, batch, hidden, attention)

    def _batch(self, plan: Plan, decodes: dict[str, DecodeRow]) -> _Batch:
        batch = _Batch([], [], [], [], {})
        for start, name in enumerate(plan.decodes):
            row = decodes[name]
            order, position = np.array([row.order], np.int32), np.array([row.position], np.int32)
            self._make_room(self.table.missing_pages(name, 1))
            self.table.append(name, order, position)
            batch.tokens.append(row.token)
            batch.positions.append(position)
            batch.rows.append(SequenceRows(name, start, start + 1))
        start = len(plan.decodes)
        for chunk in plan.chunks:
            prompt = self.prompts[chunk.sequence]
            rows = slice(chunk.start, chunk.stop)
            self.table.append(chunk.sequence, prompt.order[rows], prompt.position[rows])
            batch.pieces.append(prompt.embeddings[rows])
            batch.positions.append(prompt.position[rows])
            stop = start + chunk.stop - chunk.start
            batch.rows.append(SequenceRows(chunk.sequence, start, stop))
            if prompt.is_observed and prompt.is_whole:
                first = max(prompt.first_observed, chunk.start)
                if first < chunk.stop:
                    batch.observe[chunk.sequence] = range(start + first - chunk.start, stop)
            start = stop
        return batch

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 scores [n, V] of hidden states [n, D]."""
        return self.decoder.logits(hidden)

    def _result(self, plan: Plan, batch: _Batch, hidden: Tensor, attention: PagedAttention) -> StepResult:
        where = {rows.sequence: rows for rows in batch.rows}
        finished = list(plan.decodes)
        prompt_hidden = {}
        for chunk in plan.chunks:
            prompt = self.prompts[chunk.sequence]
            prompt.done = chunk.stop
            if chunk.sequence in attention.observed:
                prompt.observed.append(attention.observed[chunk.sequence])
            if prompt.is_whole and prompt.done == len(prompt):
                finished.append(chunk.sequence)
            if prompt.wants_logits:
                rows = where[chunk.sequence]
                prompt_hidden[chunk.sequence] = hidden[rows.start : rows.stop]
        if finished:
            last = np.array([where[name].stop - 1 for name in finished])
            logits = self.decoder.logits(hidden.index_select(0, to_device(last, self.device)))
        else:
            logits = hidden.new_empty(0, self.decoder.config.vocab_size, dtype=torch.float32)
        return StepResult(tuple(finished), logits, prompt_hidden)

    # the end of a prompt

    def remember(self, sequence: str, identity: Identity) -> None:
        """Let later prompts share the KV of a sequence, whose slots are those of `identity`."""
        self.prefix.insert(sequence, identity, len(identity.rows))

    @torch.inference_mode()
    def compress(
        self, sequence: str, policy: KVPolicy, budget: float, identity: Identity | None = None
    ) -> None:
        """Let a policy choose what every head keeps of a prefilled prompt, and free the rest.

        Survivors move to fresh pages, or within the sequence's own: raises OutOfPages when there are no
        fresh ones and others use its own too.
        """
        prompt = self.prompts[sequence]
        one_head = -(-len(prompt) // self.table.page_size)
        if identity is not None and self.available_pages < one_head:
            self.prefix.forget(identity)
        first = prompt.first_observed
        visual, order = (to_device(rows, self.device) for rows in (prompt.is_visual, prompt.order))
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
                self._make_room(-(-len(kept) // self.table.page_size))
                self.store.copy(*self.table.keep(sequence, layer, head, kept))

    def finish_prompt(self, sequence: str) -> None:
        """The prompt's rows are no longer needed, its pages stay."""
        del self.prompts[sequence]

    def import_(self, sequence: str, export: KVExport, headroom: int) -> None:
        """Create a sequence from KV that was computed elsewhere, with pages for `headroom` tokens more."""
        self._make_room(self.table.pages_for(int(export.lengths.max(initial=0)) + headroom))
        self.store.import_(self.table, sequence, export)
        self.reserve(sequence, headroom)

    def export(self, sequence: str) -> KVExport:
        return self.store.export(self.table, sequence)

    def kv_bytes(self, sequence: str) -> int:
        """Bytes of K and V in the slots a sequence holds, over all layers and heads."""
        slots = int(self.table.lengths(sequence).sum())
        return slots * self.store.page_bytes // self.table.page_size
