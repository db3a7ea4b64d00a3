"""DapQ (arXiv 2603.11564): keep what queries look at that stand where the answer will.

Where a query stands decides more about what it looks at than what it says, so rows of the prompt's end are
run once more at the positions to come, and forgotten. Which tokens these are is this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView, Probe, causal_attention
from mmserve.kv.policies.snapkv import check_pool, check_pooling, pooled
from mmserve.pruning.settings import setting, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DapQ(KVPolicy):
    """Mean attention of the pseudo queries alone, smoothed as in SnapKV."""

    name: ClassVar[str] = "dapq"
    paper: ClassVar[str] = "arXiv:2603.11564"

    ahead: int = whole(32, 1, 64, "how many positions to come are looked from")
    pool: int = setting(5, "over how many neighbouring slots scores are smoothed; odd", check_pool)
    pooling: str = setting("mean", "how: mean or max", check_pooling)

    def probe(self) -> Probe:
        return Probe("ahead", self.ahead)

    def scores(self, view: LayerView) -> Tensor:
        attention = causal_attention(view.queries, view.query_order, view.keys, view.order)
        return pooled(attention.mean(-2)[..., view.visual], self.pool, self.pooling).mean(1)
