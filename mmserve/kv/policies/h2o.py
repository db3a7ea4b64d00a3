"""H2O (arXiv 2306.14048): keep the slots that received most attention in all of the prompt, and the newest.

This is the selection at the end of prefill. Rows before the first item see no visual slot, so they need not
be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.allocation import Selection, top_per_head, with_recent
from mmserve.kv.base import Budgeted, KVPolicy, LayerView
from mmserve.kv.observers import AttentionSums
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(KVPolicy):
    """Heavy hitters by accumulated attention, the mean over the heads of a group, and recent slots."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv:2306.14048"

    recent: float = number(0.5, 0, 1, "the share of the budget that the newest visual slots get")

    def observer(self) -> AttentionSums:
        return AttentionSums()

    def scores(self, view: LayerView) -> Tensor:
        return view.sums["attention"][:, view.visual]

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        recent = (int(self.recent * count + 1e-6) for count in budget.slots)
        ranked = [with_recent(layer, count) for layer, count in zip(scores, recent, strict=True)]
        return top_per_head(ranked, budget.slots)
