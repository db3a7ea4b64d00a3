"""DynamicKV (arXiv 2412.14838): layers get what share of the best slots of all layers is theirs.

The paper settles budgets every few layers, to bound its memory while it prefills. Here all layers are there
when anything is dropped, so only its last, whole settlement is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmserve.kv.allocation import Selection, ranked, shared, top_per_head
from mmserve.kv.base import Budgeted
from mmserve.kv.policies.snapkv import MAX_WINDOW, SnapKV
from mmserve.pruning.settings import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicKV(SnapKV):
    """SnapKV's scores; a layer's budget is its part of the global best, at most `most` even budgets."""

    name: ClassVar[str] = "dynamickv"
    paper: ClassVar[str] = "arXiv:2412.14838"
    needs_all_layers: ClassVar[bool] = True

    window: int = whole(32, 1, MAX_WINDOW, "how many of the question's queries count at most, the last ones")
    most: float = number(10.0, 1, 1000, "how many even budgets a layer gets at most")

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        total = sum(count * len(layer) for layer, count in zip(scores, budget.slots, strict=True))
        best = ranked(torch.cat([layer.flatten() for layer in scores]))[:total].cpu()
        ends = torch.tensor([layer.numel() for layer in scores]).cumsum(0)
        hits = torch.bincount(torch.searchsorted(ends, best, right=True), minlength=len(scores)).tolist()
        caps = [
            min(layer.shape[1], int(self.most * count))
            for layer, count in zip(scores, budget.slots, strict=True)
        ]
        return top_per_head(scores, shared(sum(budget.slots), hits, caps))
