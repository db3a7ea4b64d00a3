"""The layers that a prompt with an inner method passes one group after another.

All rows pass a group in chunks, then the method chooses who goes on to the next one. Knows nothing about
pages or steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mmserve.pruning.inner import InnerReducer, InnerView, Survivors


@dataclass(slots=True)
class LayerGroups:
    """Where a prompt is on its way up. `bounds` are those of the groups, the model's ends included."""

    reducer: InnerReducer
    bounds: tuple[int, ...]
    stage: int = 0
    entered: int = 0  # reducible rows before the first reduction
    passed: list[int] = field(default_factory=list)  # visual rows by group
    memory: Tensor | None = None  # the method's own

    @classmethod
    def of(cls, reducer: InnerReducer, num_layers: int) -> LayerGroups:
        bounds = (0, *reducer.layers(num_layers), num_layers)
        assert all(low < high for low, high in pairwise(bounds[1:])), "layers are inside the model, ascending"
        return cls(reducer, bounds, passed=[0] * (len(bounds) - 1))

    @property
    def layers(self) -> range:
        """The group that rows pass now; the first one is empty where the method acts on the embeddings."""
        return range(self.bounds[self.stage], self.bounds[self.stage + 1])

    @property
    def visual_by_layer(self) -> tuple[int, ...]:
        """Visual rows that have passed each layer of the model."""
        groups = zip(pairwise(self.bounds), self.passed, strict=True)
        return tuple(rows for (low, high), rows in groups for _ in range(low, high))

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.bounds) - 2

    def reduce(self, view: InnerView) -> Survivors:
        """What the method lets pass, checked: a wrong one must not corrupt a cache."""
        rows, hidden, self.memory = self.reducer.reduce(view)
        kept = _kept(rows, len(view.hidden))
        assert bool(kept[~view.is_reducible].all()), "only what is reducible may be dropped"
        assert hidden.shape == (len(rows), view.hidden.shape[1]), "every survivor has its hidden state"
        return Survivors(rows, hidden, self.memory)


def _kept(rows: Tensor, count: int) -> Tensor:
    assert bool((rows.diff() > 0).all()), "survivors ascend"
    kept = torch.zeros(count, dtype=torch.bool, device=rows.device)
    kept[rows] = True
    return kept
