"""The KV policy that keeps everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmserve.kv.allocation import Selection, top_per_head
from mmserve.kv.base import Budgeted, KVPolicy, LayerView


@dataclass(frozen=True, slots=True, kw_only=True)
class NoEviction(KVPolicy):
    name: ClassVar[str] = "none"
    needs_whole_item: ClassVar[bool] = False

    def scores(self, view: LayerView) -> Tensor:
        return torch.zeros(len(view.keys), len(view.visual_slots))

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        return top_per_head(scores, [layer.shape[1] for layer in scores])
