"""A prefilled prompt and the policy that chooses what stays of its KV.

Knows nothing about steps, nor where free pages come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.cuda import to_device
from mmserve.attention.paged import Watch
from mmserve.engine.probe import Probing
from mmserve.engine.rows import PromptRows, first_visual
from mmserve.engine.scheduler import Chunk
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, Observer, Rows, slots_kept, visual_budget
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable

Kept = list[list[NDArray[np.int64]]]  # by layer and head: ascending slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What one policy does to one prompt, all heads of a layer still alike."""

    table: PageTable
    store: PageStore
    sequence: str
    prompt: PromptRows
    policy: KVPolicy
    frequencies: Tensor  # fp32 [d / 2], of RoPE
    probing: Probing | None = None  # where the policy wants more rows to run

    def choose(self, budget: float) -> Kept:
        """Which slots of every layer and head stay."""
        visual = [self._visual(layer) for layer in range(self.table.layers)]
        slots = [visual_budget(budget, len(mask), int(mask.sum())) for mask in visual]
        most = [int(mask.sum()) for mask in visual]
        if not any(most) or (slots == most and self.policy.count == "exact"):
            return [[np.arange(len(mask))] * self.table.kv_heads for mask in visual]
        probe = self.policy.probe()
        if probe is not None:
            assert self.probing is not None, "who probes can"
            self.probing.run(probe)
        scores, weights = [], []
        for layer in range(self.table.layers):
            view = self.view(layer)
            scores.append(self.policy.scores(view))
            weights.append(self.policy.weight(view))
        chosen = self.policy.allocate(scores, Budgeted(slots, weights))
        return [
            [slots_kept(mask, head) for head in heads] for mask, heads in zip(visual, chosen, strict=True)
        ]

    def view(self, layer: int) -> LayerView:
        table, prompt, device = self.table, self.prompt, self.store.k.device
        keys, values = self.store.read(table.slots(self.sequence, layer))
        order = to_device(table.order(self.sequence, layer, 0), device)
        queries, query_order = self._queries(layer, keys)
        return LayerView(
            layer=layer,
            layers=table.layers,
            queries=queries,
            query_order=query_order,
            keys=keys,
            values=values,
            visual=to_device(self._visual(layer), device),
            order=order,
            position=to_device(table.position(self.sequence, layer, 0), device),
            next_position=int(prompt.position[-1]) + 1,
            frequencies=self.frequencies,
            sums={} if self._observer is None else self._observer.sums(layer, order),
        )

    @property
    def _observer(self) -> Observer | None:
        return self.prompt.observer if self.probing is None else self.probing.observer

    def _queries(self, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Those that were observed, and their orders."""
        prompt = self.prompt
        found = list(prompt.observed.get(layer, []))
        order = prompt.order[len(prompt) - sum(map(len, found)) :]
        if self.probing is not None:
            found += self.probing.queries.get(layer, [])
            order = np.concatenate([order, *self.probing.order])
        queries = torch.cat(found) if found else keys.new_empty(0, *keys.shape[::2])
        return queries, to_device(order, keys.device)

    def apply(self, kept: Kept, make_room: Callable[[int], None]) -> None:
        """Free the pages of all other slots; `make_room` is told how many pages survivors move to."""
        for layer, heads in enumerate(kept):
            view = self.view(layer) if self.policy.merges else None
            for head, slots in enumerate(heads):
                make_room(-(-len(slots) // self.table.page_size))
                moves = self.table.keep(self.sequence, layer, head, slots)
                if view is None or not len(moves.source):
                    self.store.copy(*moves)
                else:
                    self.store.write(moves.destination, *self._merged(view, head, slots))

    def _merged(self, view: LayerView, head: int, slots: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        evicted = np.setdiff1d(np.arange(len(view.order)), slots, assume_unique=True)
        device = view.keys.device
        return self.policy.merge(view, head, to_device(slots, device), to_device(evicted, device))

    def _visual(self, layer: int) -> NDArray[np.bool_]:
        prompt, order = self.prompt, self.table.order(self.sequence, layer, 0)
        if len(order) == len(prompt):
            return prompt.is_visual
        # whatever an inner method or a carrier has let go, it was visual
        return np.isin(order, prompt.order[~prompt.is_visual], invert=True)


def watched(
    table: PageTable,
    store: PageStore,
    chunk: Chunk,
    prompt: PromptRows,
    start: int,
    frequencies: Tensor,
) -> list[Watch]:
    """What a prompt's observer is shown of a chunk that begins at `start` of the packed batch."""
    first = max(first_visual(prompt.is_visual), chunk.start)
    if prompt.observer is None or first >= chunk.stop:
        return []
    observer, rows, sequence = prompt.observer, slice(first, chunk.stop), chunk.sequence
    until = None if prompt.until is None else prompt.until_of(table.order(sequence, 0, 0))

    def see(layer: int, queries: Tensor, hidden: Tensor) -> None:
        if prompt.failure is not None:
            return
        seen = Rows(
            layer=layer,
            queries=queries,
            hidden=hidden,
            order=prompt.order[rows],
            position=prompt.position[rows],
            key_order=table.order(sequence, layer, 0),
            key_until=until,
            frequencies=frequencies,
            read=lambda: store.read(table.slots(sequence, layer)),
        )
        try:
            observer.see(seen)
        except Exception as error:  # others run in this step too
            prompt.failure = error

    return [Watch(range(start + first - chunk.start, start + chunk.stop - chunk.start), see)]
