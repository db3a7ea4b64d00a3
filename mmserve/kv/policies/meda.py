"""MEDA (arXiv 2502.17599): layers whose attention is spread out get more of the budget; LOOK-M's merging.

A layer's weight is exp of the entropy of its attention maps, by the mean over rows and heads, as the authors'
program computes it; their paper takes the part of the maps between text and visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.allocation import Selection, shared
from mmserve.kv.base import Budgeted, LayerView
from mmserve.kv.observers import AttentionSums
from mmserve.kv.policies.h2o import H2O
from mmserve.kv.policies.look_m import LookM
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class MEDA(LookM):
    """LOOK-M with the budget shared out over layers by the softmax of their entropies."""

    name: ClassVar[str] = "meda"
    paper: ClassVar[str] = "arXiv:2502.17599"
    needs_all_layers: ClassVar[bool] = True

    least: float = number(0.01, 0, 1, "the share of its visual slots that every layer keeps")

    def observer(self) -> AttentionSums:
        return AttentionSums(with_entropy=True)

    def weight(self, view: LayerView) -> float:
        return math.exp(float(view.sums["entropy"]))

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        caps = [layer.shape[1] for layer in scores]
        slots = shared(sum(budget.slots), budget.weights, caps, least=self.least)
        return H2O.allocate(self, scores, Budgeted(slots, budget.weights))
