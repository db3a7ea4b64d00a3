"""Prompts as attention sees them while an `LLM` of this process answers: queries, keys and values.

Knows nothing about what they are recorded for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmserve.attention.backend import ATTENTION
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.search import Recorded
from mmserve.methods import MAX_SLOTS
from mmserve.request import Methods

# a pattern is told what rows are; so long a prompt never comes
METHODS = Methods(attention="mminference", attention_dense_below=MAX_SLOTS)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Prompts with `METHODS` of models that are loaded inside, in the order in which they end."""
    recorded: list[Recorded] = []
    queries: dict[str, list[list[Tensor]]] = {}  # of a sequence, by layer, chunk after chunk

    class Recording(PagedAttention):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().attend(layer, q, k, v)
            for rows in (*self._prompts, *self._decodes):
                if rows.sparse is not None:
                    self._record(layer, rows, q[rows.start : rows.stop])
            return out

        def _record(self, layer: int, rows: SequenceRows, q: Tensor) -> None:
            assert rows.sparse is not None, "asked for by who has checked"
            table, store = self._table, self._store
            own = queries.setdefault(rows.sequence, [[] for _ in range(table.layers)])
            own[layer].append(q.to(store.k.dtype))
            if not rows.sparse.is_end or layer != table.layers - 1:
                return
            kinds = rows.sparse.kinds
            both = [store.read(table.slots(rows.sequence, each)) for each in range(table.layers)]
            recorded.append(
                Recorded(
                    is_visual=kinds.is_visual.copy(),
                    item=kinds.item.copy(),
                    frame=kinds.frame.copy(),
                    queries=tuple(torch.cat(chunks) for chunks in queries.pop(rows.sequence)),
                    keys=tuple(keys.transpose(0, 1).contiguous() for keys, _ in both),
                    values=tuple(values.transpose(0, 1).contiguous() for _, values in both),
                )
            )

    served = dict(ATTENTION)
    ATTENTION.update(dict.fromkeys(served, Recording))
    try:
        yield recorded
    finally:
        ATTENTION.update(served)
