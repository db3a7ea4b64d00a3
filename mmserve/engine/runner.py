"""Runs plans on the model: packed rows in, logits and KV out. Decides nothing.

A sequence's K/V live in head-owned pages from its first prompt row until `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.backend import attention_for
from mmserve.attention.cuda import CudaAttention, to_device
from mmserve.attention.paged import PagedAttention, SequenceRows, Watch
from mmserve.attention.quantized import QuantizedAttention
from mmserve.attention.selection import PageSelection
from mmserve.engine.batch import Batch, StepResult, observed
from mmserve.engine.compression import Compression, watched
from mmserve.engine.graphs import MAX_ROWS, DecodeGraphs
from mmserve.engine.groups import LayerGroups
from mmserve.engine.pages import WorkerPages
from mmserve.engine.probe import Probing
from mmserve.engine.rows import DecodeRow, PromptRows, first_visual, row_after
from mmserve.engine.scheduler import Chunk, Plan
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kv.base import KVPolicy
from mmserve.kv.identity import Identity
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import fused_forward
from mmserve.models.rope import rope_frequencies_on
from mmserve.pruning.inner import InnerView


class Runner(WorkerPages):
    """Model and pages of one language worker."""

    def __init__(
        self,
        decoder: TextDecoder,
        table: PageTable,
        store: PageStore,
        device: torch.device,
        codec: Kind | None = None,
    ) -> None:
        super().__init__(table, store, decoder.embed_tokens.weight.dtype, codec)
        self.decoder = decoder
        self.device = device
        self.prompts: dict[str, PromptRows] = {}
        self._selections: dict[str, PageSelection] = {}
        # for steps of decodes alone, where a launch costs more than what it does
        self._is_alike = store.k.dtype is self._dtype
        can_capture = device.type == "cuda" and backend_for(device) == "triton" and self._is_alike
        self.graphs = DecodeGraphs(decoder, table, store) if can_capture else None
        self.attention = attention_for(device)
        config = decoder.config
        self._frequencies = rope_frequencies_on(device, config.head_dim, config.rope_theta)

    # pages

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

    def release(self, sequence: str) -> None:
        """Forget a sequence, whatever it is doing; harmless when it is unknown."""
        self.prompts.pop(sequence, None)
        self._selections.pop(sequence, None)
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
        can_replay = not plan.chunks and all(rows.selection is None for rows in batch.rows)
        if self.graphs is not None and can_replay and len(plan.decodes) <= MAX_ROWS:
            return StepResult(plan.decodes, self.graphs.run(plan.decodes, batch.tokens, positions), {})
        attention = self._attention(plan, batch, layers)
        decoding = [self.embed(batch.tokens)] if batch.tokens else []
        rows, where = torch.cat([*decoding, *batch.pieces]), to_device(positions, self.device)
        hidden = self._forward(attention, rows, where, layers, batch.watch)
        return self._result(plan, batch, hidden, attention)

    def _forward(
        self,
        attention: PagedAttention | QuantizedAttention,
        rows: Tensor,
        where: Tensor,
        layers: range | None,
        watch: Sequence[Watch],
    ) -> Tensor:
        tap = attention.tap if watch else None
        if attention.is_fused and self._is_alike:
            assert isinstance(attention, CudaAttention | QuantizedAttention), "products are for a GPU"
            return fused_forward(self.decoder, rows, where, attention.attend_products, layers, tap)
        hidden: Tensor = self.decoder(rows, where, attention.attend, layers, tap)
        return hidden

    def _attention(
        self, plan: Plan, batch: Batch, layers: range | None
    ) -> PagedAttention | QuantizedAttention:
        return self.attention(self.table, self.store, batch.rows, batch.observe, layers, batch.watch)

    def _append(self, sequence: str, order: NDArray[np.int32], position: NDArray[np.int32]) -> None:
        """The next slot of an answer."""
        self._make_room(self.table.missing_pages(sequence, 1))
        self.table.append(sequence, order, position)

    def _selection(self, sequence: str, row: DecodeRow) -> PageSelection | None:
        """Of an answer that does not read all its pages."""
        if row.selector is not None and sequence not in self._selections:
            found = PageSelection(row.selector, self.table, self.store, sequence)
            self._selections[sequence] = found
        return self._selections.get(sequence)

    def _batch(self, layers: range | None, plan: Plan, decodes: dict[str, DecodeRow]) -> Batch:
        batch = Batch([], [], [], [], {}, [])
        for start, name in enumerate(plan.decodes):
            row = decodes[name]
            order, position = np.array([row.order], np.int32), np.array([row.position], np.int32)
            self._append(name, order, position)
            batch.tokens.append(row.token)
            batch.positions.append(position)
            selection = self._selection(name, row)
            batch.rows.append(SequenceRows(name, start, start + 1, selection=selection))
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
            sparse = prompt.sparse_rows(chunk.stop)
            batch.rows.append(SequenceRows(chunk.sequence, start, stop, until, sparse))
            batch.observe.update(observed(chunk, prompt, start))
            batch.watch.extend(watched(self.table, self.store, chunk, prompt, start, self._frequencies))
            start = stop
        return batch

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 scores [n, V] of hidden states [n, D]."""
        return self.decoder.logits(hidden)

    def _result(
        self, plan: Plan, batch: Batch, hidden: Tensor, attention: PagedAttention | QuantizedAttention
    ) -> StepResult:
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
            for row, name in enumerate(finished[len(plan.decodes) :], len(plan.decodes)):
                self.prompts[name].logits = logits[row]
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
        groups.passed[groups.stage] += int(prompt.is_visual[rows].sum())
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
            prompt.patch = prompt.patch[kept]
            if prompt.pattern is not None:
                prompt.item, prompt.frame = prompt.item[kept], prompt.frame[kept]
            if groups.reducer.drops_below:
                self._keep_below(sequence, prompt.order, groups.layers.stop)
        groups.stage += 1
        prompt.done = prompt.cached
        above = range(groups.layers.start, self.table.layers)
        self.table.trim(sequence, len(prompt) - prompt.cached + prompt.headroom, above)

    def _keep_below(self, sequence: str, order: NDArray[np.int32], layers: int) -> None:
        """In so many first layers only slots of these orders stay."""
        for layer in range(layers):
            kept = np.flatnonzero(np.isin(self.table.order(sequence, layer, 0), order))
            for head in range(self.table.kv_heads):
                self._make_room(-(-len(kept) // self.table.page_size))
                self.store.copy(*self.table.keep(sequence, layer, head, kept))

    def _view(self, sequence: str, prompt: PromptRows, groups: LayerGroups, first: int) -> InnerView:
        queries = keys = None
        below = groups.layers.stop - 1
        if groups.layers:
            queries = torch.cat(prompt.observed[below])
            keys, _ = self.store.read(self.table.slots(sequence, below))
        is_visual, is_reducible, patch = (
            to_device(rows[first:], self.device)
            for rows in (prompt.is_visual, prompt.is_reducible, prompt.patch)
        )
        return InnerView(
            stage=groups.stage,
            stages=len(groups.bounds) - 2,
            memory=groups.memory,
            entered=groups.entered,
            hidden=prompt.embeddings[first : len(prompt)],
            is_visual=is_visual,
            is_reducible=is_reducible,
            patch=patch,
            queries=queries,
            keys=keys,
        )

    # the end of a prompt

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
        compression = Compression(
            table=self.table,
            store=self.store,
            sequence=sequence,
            prompt=prompt,
            policy=policy,
            frequencies=self._frequencies,
            probing=self._probing(sequence, prompt, policy),
        )
        compression.apply(compression.choose(budget), self._make_room)

    def _probing(self, sequence: str, prompt: PromptRows, policy: KVPolicy) -> Probing | None:
        if policy.probe() is None:
            return None
        return Probing(
            table=self.table,
            store=self.store,
            sequence=sequence,
            prompt=prompt,
            observer=policy.observer(),
            frequencies=self._frequencies,
            run_after=self._run_after,
            embed=self.embed,
            best=lambda hidden: int(self.decoder.logits(hidden).argmax()),
        )

    def _run_after(
        self,
        sequence: str,
        rows: Tensor,
        order: NDArray[np.int32],
        position: NDArray[np.int32],
        see: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Hidden states of rows that are appended to a prompt which is over."""
        self._make_room(self.table.missing_pages(sequence, len(order)))
        self.table.append(sequence, order, position)
        watch = [Watch(range(len(order)), see)]
        alone = [SequenceRows(sequence, 0, len(order))]
        attention = self.attention(self.table, self.store, alone, None, None, watch)
        return self._forward(attention, rows, to_device(position, self.device), None, watch)

    def finish_prompt(self, sequence: str) -> None:
        """The prompt's rows are no longer needed, its pages stay."""
        del self.prompts[sequence]
