"""KVzip (arXiv 2505.23416): keep what the model looks at while it repeats what it was shown.

After prefill the prompt from its first to its last visual token runs once more behind itself, a chunk at a
time; a slot's score is the most attention that any row of the chunk that repeats it pays to it. This costs
about as much as prefill did. The authors ask for the repetition in words; here it just follows the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmserve.kv.allocation import Selection, over_heads, whole_model
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, Probe, Rows, causal_attention
from mmserve.kv.observers import ByOrder
from mmserve.pruning.settings import flag, whole


class Repeated:
    """The largest attention of a repetition to each slot that it repeats: "attention" [kv_heads, S]."""

    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._found: dict[int, ByOrder] = {}

    def see(self, rows: Rows) -> None:
        """Rows look at the sink, at what they repeat, and at each other."""
        assert rows.repeats is not None, "only a repetition is seen"
        keys, _ = rows.read()
        repeated = np.isin(rows.key_order, rows.repeats)
        if not repeated.any():  # nothing of it is left
            return
        seen = repeated | (rows.key_order < self._sink) | (rows.key_order >= rows.order[0])
        index = torch.from_numpy(np.flatnonzero(seen)).to(keys.device)
        order, key_order = (
            torch.from_numpy(array).to(keys.device) for array in (rows.order, rows.key_order[seen])
        )
        attention = causal_attention(rows.queries, order, keys[:, index], key_order)
        best = attention.amax((1, 2))[:, torch.from_numpy(repeated[seen]).to(keys.device)]
        # no slot is repeated twice
        self._found.setdefault(rows.layer, ByOrder()).add(rows.key_order[repeated], best)

    def sums(self, layer: int, order: Tensor) -> dict[str, Tensor]:
        return {"attention": self._found[layer].of(order)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzip(KVPolicy):
    """The best slots of all layers and heads together, or of each layer."""

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "arXiv:2505.23416"
    needs_all_layers: ClassVar[bool] = True

    chunk: int = whole(2048, 16, 1 << 16, "how many tokens are repeated at a time")
    sink: int = whole(4, 0, 1024, "tokens at the beginning of the prompt that every repetition sees")
    layerwise: bool = flag(False, "whether layers keep as much as each other")

    def probe(self) -> Probe:
        return Probe("repeat", self.chunk)

    def observer(self) -> Repeated:
        return Repeated(self.sink)

    def scores(self, view: LayerView) -> Tensor:
        return view.sums["attention"].masked_fill(view.order < self.sink, 1.0)[:, view.visual]

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        if self.layerwise:
            return over_heads(scores, budget.slots, 0.0)
        return whole_model(scores, budget.slots)
