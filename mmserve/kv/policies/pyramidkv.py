"""PyramidKV (arXiv 2406.02069): lower layers keep more, upper ones less, along a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from mmserve.kv.allocation import Selection, shared, top_per_head
from mmserve.kv.base import Budgeted
from mmserve.kv.policies.snapkv import SnapKV
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores with budgets from 2 B - B / beta at the bottom to B / beta at the top."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv:2406.02069"
    needs_all_layers: ClassVar[bool] = False
    granularity: ClassVar[Literal["head"]] = "head"

    beta: float = number(20.0, 1, 1000, "how steep: the top layer keeps an even budget divided by this")

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        caps = [layer.shape[1] for layer in scores]
        return top_per_head(scores, pyramid(budget.slots, caps, self.beta))


def pyramid(slots: Sequence[int], caps: Sequence[int], beta: float) -> list[int]:
    """Budgets on a line around their mean, none above its cap; their sum stays."""
    layers, mean = len(slots), sum(slots) / len(slots)
    # where the bottom is all there is, the line is less steep around the same mean
    bottom = min(2 * mean - mean / beta, max(caps))
    return shared(sum(slots), np.linspace(bottom, 2 * mean - bottom, layers).tolist(), caps)
