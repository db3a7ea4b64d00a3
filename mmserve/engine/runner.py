"""Runs plans on the model: packed rows in, logits and KV out. Decides nothing.

A sequence's K/V live in head-owned pages from its first prompt row until `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.backend import attention_for
from mmserve.attention.cuda import CudaAttention, to_device
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.engine.graphs import MAX_ROWS, DecodeGraphs
from mmserve.engine.groups import LayerGroups
from mmserve.engine.rows import DecodeRow, PromptRows, first_visual, row_after
from mmserve.engine.scheduler import Chunk, Plan
from mmserve.kernels.dispatch import backend_for
from mmserve.kv.base import KVPolicy, LayerView
from mmserve.kv.identity import Identity
from mmserve.kv.prefix import PrefixCache
from mmserve.kv.store import KVExport, PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import fused_forward
from mmserve.pruning.inner import InnerView


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
        """Leading slots whose KV is there, `most` at most, and those of its pages that are in use anyway."""
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
        """Take what the prefix cache has, and pages for all other slots and `headroom` tokens after them."""
        self.prompts[sequence] = prompt
        if identity is not None and (found := self.prefix.match(identity, most_cached)):
            self.prefix.take(sequence, identity, found)
            prompt.cached, prompt.done = found, row_after(found, prompt.until)
        prompt.headroom = headroom
        self.reserve(sequence, prompt.slots - prompt.cached + headroom)

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
        """One step of every decode and chunk of the plan.

        They go through the model together, but for prompts that pass it in groups of layers: of these, who
        passes the same layers goes together.
        """
        groups: dict[range | None, list[Chunk]] = {None: []} if plan.decodes else {}
        for chunk in plan.chunks:
            groups.setdefault(self.prompts[chunk.sequence].layers, []).append(chunk)
        parts = []
        for layers, chunks in groups.items():
            own = Plan(plan.decodes if layers is None else (), tuple(chunks))
            parts.append(self._run_through(layers, own, decodes))
        if len(parts) == 1:
            return parts[0]
        names = tuple(name for part in parts for name in part.names)
        hidden = {name: rows for part in parts for name, rows in part.prompt_hidden.items()}
        return StepResult(names, torch.cat([part.logits for part in parts]), hidden)

    def _run_through(self, layers: range | None, plan: Plan, decodes: dict[str, DecodeRow]) -> StepResult:
        """Through a group of layers, or all."""
        batch = self._batch(layers, plan, decodes)
        positions = np.concatenate(batch.positions)
        if self.graphs is not None and not plan.chunks and len(plan.decodes) <= MAX_ROWS:
            return StepResult(plan.decodes, self.graphs.run(plan.decodes, batch.tokens, positions), {})
        attention = self.attention(self.table, self.store, batch.rows, batch.observe, layers)
        decoding = [self.embed(batch.tokens)] if batch.tokens else []
        rows, where = torch.cat([*decoding, *batch.pieces]), to_device(positions, self.device)
        if isinstance(attention, CudaAttention):
            hidden = fused_forward(self.decoder, rows, where, attention.attend_products, layers)
        else:
            hidden = self.decoder(rows, where, attention.attend, layers)
        return self._result(plan, batch, hidden, attention)

    def _batch(self, layers: range | None, plan: Plan, decodes: dict[str, DecodeRow]) -> _Batch:
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
            self.table.append(chunk.sequence, prompt.order[rows], prompt.position[rows], layers)
            batch.pieces.append(prompt.embeddings[rows])
            batch.positions.append(prompt.position[rows])
            stop = start + chunk.stop - chunk.start
            until = None
            if prompt.until is not None:
                until = prompt.until_of(self.table.order(chunk.sequence, 0, 0))
            batch.rows.append(SequenceRows(chunk.sequence, start, stop, until))
            batch.observe.update(_observed(chunk, prompt, start))
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
            first_layer = 0 if prompt.layers is None else prompt.layers.start
            for layer, queries in enumerate(attention.observed.get(chunk.sequence, []), first_layer):
                prompt.observed.setdefault(layer, []).append(queries)
            rows = where[chunk.sequence]
            if prompt.groups is not None:
                self._leave_group(chunk, prompt, prompt.groups, hidden[rows.start : rows.stop])
            if prompt.until is not None:
                self._drop_unseen(chunk.sequence, prompt)
            if prompt.is_over:
                finished.append(chunk.sequence)
            if prompt.wants_logits:
                prompt_hidden[chunk.sequence] = hidden[rows.start : rows.stop]
        if finished:
            last = np.array([where[name].stop - 1 for name in finished])
            logits = self.decoder.logits(hidden.index_select(0, to_device(last, self.device)))
        else:
            logits = hidden.new_empty(0, self.decoder.config.vocab_size, dtype=torch.float32)
        return StepResult(tuple(finished), logits, prompt_hidden)

    def _drop_unseen(self, sequence: str, prompt: PromptRows) -> None:
        """Slots that no row to come sees leave; what they had is for the next rows, and free at the end."""
        seen = prompt.is_seen(self.table.order(sequence, 0, 0))
        if not seen.all():
            start = int(seen.argmin())
            kept = start + np.flatnonzero(seen[start:])
            moves = self.table.compact(sequence, start, kept)
            self.store.copy(*(to_device(slots, self.device) for slots in moves))
        if prompt.is_over:
            self.table.trim(sequence, prompt.headroom)

    # groups of layers

    def _leave_group(self, chunk: Chunk, prompt: PromptRows, groups: LayerGroups, hidden: Tensor) -> None:
        """What comes out of a group of layers is the input of the next one."""
        rows = slice(chunk.start, chunk.stop)
        groups.visual_slots += int(prompt.is_visual[rows].sum()) * len(groups.layers)
        if not groups.is_last:
            prompt.embeddings[rows] = hidden
        elif prompt.is_over:
            self.table.unite(chunk.sequence)

    @torch.inference_mode()
    def advance(self, sequence: str) -> None:
        """Where all rows of a prompt have passed a group of layers, choose who goes on to the next one.

        The pages that the layers from there on do not need any more become free.
        """
        prompt = self.prompts[sequence]
        while prompt.is_due:
            assert prompt.groups is not None, "only who has groups is due"
            self._reduce(sequence, prompt, prompt.groups)

    def _reduce(self, sequence: str, prompt: PromptRows, groups: LayerGroups) -> None:
        if groups.stage == 0:
            groups.entered = int(prompt.is_reducible.sum())
        first = first_visual(prompt.is_visual)
        if groups.entered:
            view = self._view(sequence, prompt, groups, first)
            rows, hidden, _ = groups.reduce(view)
            prompt.embeddings[first : first + len(rows)] = hidden
            kept = np.concatenate([np.arange(first), first + rows.cpu().numpy()])
            prompt.order, prompt.position = prompt.order[kept], prompt.position[kept]
            prompt.is_visual, prompt.is_reducible = prompt.is_visual[kept], prompt.is_reducible[kept]
        groups.stage += 1
        prompt.done = prompt.cached
        above = range(groups.layers.start, self.table.layers)
        self.table.trim(sequence, len(prompt) - prompt.cached + prompt.headroom, above)

    def _view(self, sequence: str, prompt: PromptRows, groups: LayerGroups, first: int) -> InnerView:
        queries = keys = None
        below = groups.layers.stop - 1
        if groups.layers:
            queries = torch.cat(prompt.observed[below])
            keys, _ = self.store.read(self.table.slots(sequence, below))
        is_visual, is_reducible = (
            to_device(rows[first:], self.device) for rows in (prompt.is_visual, prompt.is_reducible)
        )
        return InnerView(
            stage=groups.stage,
            stages=len(groups.bounds) - 2,
            memory=groups.memory,
            entered=groups.entered,
            hidden=prompt.embeddings[first : len(prompt)],
            is_visual=is_visual,
            is_reducible=is_reducible,
            queries=queries,
            keys=keys,
        )

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
        # layers below an inner method have more slots than rows are left
        one_head = -(-int(self.table.lengths(sequence).max()) // self.table.page_size)
        if identity is not None and self.available_pages < one_head:
            self.prefix.forget(identity)
        query_order = to_device(prompt.order[prompt.first_observed :], self.device)
        text = prompt.order[~prompt.is_visual]  # whatever an inner method has dropped, it was visual
        for layer in range(self.table.layers):
            keys, values = self.store.read(self.table.slots(sequence, layer))
            order = self.table.order(sequence, layer, 0)
            view = LayerView(
                layer=layer,
                queries=torch.cat(prompt.observed[layer]),
                query_order=query_order,
                keys=keys,
                values=values,
                visual=to_device(np.isin(order, text, invert=True), self.device),
                order=to_device(order, self.device),
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

    def kv_bytes_of(self, rows: int) -> int:
        """The same of so many rows that are in all layers and heads."""
        slots = rows * self.table.layers * self.table.kv_heads
        return slots * self.store.page_bytes // self.table.page_size


def _observed(chunk: Chunk, prompt: PromptRows, start: int) -> dict[str, range]:
    """Which rows of the packed batch are observed, for a chunk that begins at `start` of it."""
    if not prompt.is_observed or not prompt.is_whole:
        return {}
    first = max(prompt.first_observed, chunk.start)
    if first >= chunk.stop:
        return {}
    return {chunk.sequence: range(start + first - chunk.start, start + chunk.stop - chunk.start)}
