"""Lookahead Q-Cache (arXiv 2505.20334): keep what the answer's own first queries look at.

They are drawn greedily before anything leaves, and forgotten. The paper draws them with a cache that SnapKV
has cut already, to save time; here the whole one is still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView, Probe, causal_attention
from mmserve.kv.policies.snapkv import check_pool, check_pooling, pooled
from mmserve.pruning.settings import setting, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadQ(KVPolicy):
    """Mean attention of the question's last queries and of the answer's first, smoothed as in SnapKV."""

    name: ClassVar[str] = "laq"
    paper: ClassVar[str] = "arXiv:2505.20334"
    needs_query: ClassVar[bool] = True

    ahead: int = whole(8, 1, 64, "how many tokens of the answer are drawn")
    window: int = whole(8, 0, 64, "how many of the question's queries count too, the last ones")
    pool: int = setting(7, "over how many neighbouring slots scores are smoothed; odd", check_pool)
    pooling: str = setting("max", "how: mean or max", check_pooling)

    def probe(self) -> Probe:
        return Probe("answer", self.ahead)

    def scores(self, view: LayerView) -> Tensor:
        last = self.ahead + self.window
        attention = causal_attention(view.queries[-last:], view.query_order[-last:], view.keys, view.order)
        return pooled(attention.mean(-2)[..., view.visual], self.pool, self.pooling).mean(1)
