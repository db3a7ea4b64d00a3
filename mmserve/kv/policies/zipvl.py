"""ZipVL (arXiv 2410.08584): every layer keeps as few slots as receive nearly all of its attention.

How many comes from accumulated attention, which ones from attention per row that could see a slot. The budget
is a bound: with 1 the number is the paper's. Its sparse prefill is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmserve.kv.allocation import Selection, top_per_head
from mmserve.kv.base import Budgeted, KVPolicy, LayerView
from mmserve.kv.observers import AttentionSums
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipVL(KVPolicy):
    """All heads of a layer alike; a layer's weight is how many visual slots reach `tau`."""

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "arXiv:2410.08584"
    granularity: ClassVar[Literal["layer"]] = "layer"
    count: ClassVar[Literal["bound"]] = "bound"

    tau: float = number(0.975, 0, 1, "the share of visual slots' attention that those kept receive")

    def observer(self) -> AttentionSums:
        return AttentionSums()

    def scores(self, view: LayerView) -> Tensor:
        received = view.sums["attention"].mean(0) / view.sums["rows"].clamp(min=1)
        return received[view.visual].expand(len(view.keys), -1)

    def weight(self, view: LayerView) -> float:
        received = view.sums["attention"].mean(0)[view.visual].sort(descending=True).values.cumsum(0)
        return int((received < self.tau * received[-1]).sum()) + 1 if len(received) else 0

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        slots = [min(most, int(count)) for most, count in zip(budget.slots, budget.weights, strict=True)]
        return top_per_head(scores, slots)
