"""AdaKV (arXiv 2407.11550): heads of a layer share its budget, those with spread-out attention get more.

Scores are SnapKV's, as in the paper's Ada-SnapKV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.allocation import Selection, over_heads
from mmserve.kv.base import Budgeted
from mmserve.kv.policies.snapkv import MAX_WINDOW, SnapKV, check_pool, check_pooling
from mmserve.pruning.settings import number, setting, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaKV(SnapKV):
    """The best of all heads of a layer together, after a share of the budget that each head is sure of."""

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "arXiv:2407.11550"

    window: int = whole(32, 1, MAX_WINDOW, "how many of the question's queries count at most, the last ones")
    pool: int = setting(7, "over how many neighbouring slots scores are smoothed; odd", check_pool)
    pooling: str = setting("max", "how: mean or max", check_pooling)
    floor: float = number(0.2, 0, 1, "the share of an even budget that every head is sure of")

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        return over_heads(scores, budget.slots, self.floor)
