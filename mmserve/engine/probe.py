"""Rows that run after a prompt for a KV policy to look at, and leave nothing behind.

Knows nothing about what a policy makes of them, nor where free pages come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmserve.engine.rows import PromptRows, first_visual
from mmserve.kv.base import Observer, Probe, Rows
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable

LEAD_IN = 8  # rows before those that are repeated, as KVzip's authors have it

See = Callable[[int, Tensor, Tensor], None]  # layer, queries, hidden


class RunsAfter(Protocol):
    def __call__(
        self, sequence: str, rows: Tensor, order: NDArray[np.int32], position: NDArray[np.int32], see: See
    ) -> Tensor:
        """Append embeddings [n, D] to a prompt and run them: hidden states [n, D]."""
        ...


@dataclass(slots=True, kw_only=True)
class Probing:
    """One probe of one prompt, all heads still alike. Afterwards `queries` holds those of its rows."""

    table: PageTable
    store: PageStore
    sequence: str
    prompt: PromptRows
    observer: Observer | None
    frequencies: Tensor
    run_after: RunsAfter
    embed: Callable[[list[int]], Tensor]
    best: Callable[[Tensor], int]  # the likeliest token after a hidden state [1, D]
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    order: list[NDArray[np.int32]] = field(default_factory=list)

    def run(self, probe: Probe) -> None:
        """Run it; what it appended is dropped again, whatever happens."""
        start = int(self.table.lengths(self.sequence).max())
        try:
            if probe.kind == "repeat":
                self._repeat(probe.rows, start)
            elif probe.kind == "ahead":
                self._step(self.prompt.embeddings[max(len(self.prompt) - probe.rows, 0) : len(self.prompt)])
            else:
                self._answer(probe.rows)
        finally:
            self._forget(start)

    def _repeat(self, rows: int, start: int) -> None:
        visual = np.flatnonzero(self.prompt.is_visual)
        stop = int(visual[-1]) + 1
        for first in range(first_visual(self.prompt.is_visual), stop, rows):
            last = min(first + rows, stop)
            lead = self.prompt.embeddings[max(first - LEAD_IN, 0) : last]
            self._step(lead, repeats=self.prompt.order[first:last], keeps_queries=False)
            self._forget(start)

    def _answer(self, rows: int) -> None:
        assert self.prompt.logits is not None, "the prompt is over"
        token = int(self.prompt.logits.argmax())
        for _ in range(rows):
            token = self.best(self._step(self.embed([token])))

    def _step(
        self, rows: Tensor, *, repeats: NDArray[np.int32] | None = None, keeps_queries: bool = True
    ) -> Tensor:
        """Hidden state [1, D] of the last of rows behind what is there."""
        done = sum(map(len, self.order))
        count = np.arange(1 + done, 1 + done + len(rows), dtype=np.int32)
        order, position = self.prompt.order[-1] + count, self.prompt.position[-1] + count

        def see(layer: int, queries: Tensor, hidden: Tensor) -> None:
            if keeps_queries:
                self.queries.setdefault(layer, []).append(queries)
            if self.observer is not None:
                self.observer.see(self._rows(layer, queries, hidden, order, position, repeats))

        found = self.run_after(self.sequence, rows, order, position, see)
        if keeps_queries:
            self.order.append(order)
        return found[-1:]

    def _rows(
        self,
        layer: int,
        queries: Tensor,
        hidden: Tensor,
        order: NDArray[np.int32],
        position: NDArray[np.int32],
        repeats: NDArray[np.int32] | None,
    ) -> Rows:
        return Rows(
            layer=layer,
            queries=queries,
            hidden=hidden,
            order=order,
            position=position,
            key_order=self.table.order(self.sequence, layer, 0),
            key_until=None,
            frequencies=self.frequencies,
            read=lambda: self.store.read(self.table.slots(self.sequence, layer)),
            repeats=repeats,
        )

    def _forget(self, start: int) -> None:
        self.table.compact(self.sequence, start, np.empty(0, np.int64))


def rows_after(probe: Probe | None, prompt: int) -> int:
    """How many slots a probe of a prompt of so many rows takes at a time."""
    if probe is None:
        return 0
    return min(probe.rows, prompt) + LEAD_IN if probe.kind == "repeat" else probe.rows
