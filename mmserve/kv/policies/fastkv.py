"""FastKV (arXiv 2502.01068): above a layer only tokens go on that the question looks at; then SnapKV.

The two are apart: `rate` says how many go on, the budget how many slots stay. Layers above keep as many slots
as those below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.allocation import Selection, top_per_head
from mmserve.kv.base import Budgeted
from mmserve.kv.policies.snapkv import MAX_WINDOW, SnapKV, check_pool, pooled
from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerReducer, InnerView, Survivors, keep_top
from mmserve.pruning.settings import number, setting, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPropagation(InnerMethod):
    """The inner half: at the input of `layer` the share `keep` goes on, by the window's attention below."""

    name: ClassVar[str] = "fastkv"
    paper: ClassVar[str] = "arXiv:2502.01068"
    acts_at: ClassVar[str] = "layer l / 2"

    layer: int
    window: int
    pool: int

    def layers(self, num_layers: int) -> tuple[int, ...]:
        layer = self.layer or num_layers // 2
        return (min(layer, num_layers - 1),) if num_layers > 1 else ()

    def reduce(self, view: InnerView) -> Survivors:
        paid = pooled(view.attention(self.window).sum(0, keepdim=True), self.pool)[0]
        rows = keep_top(view, paid, exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class FastKV(SnapKV):
    """SnapKV's scores of a short window, and a reducer that thins out tokens half way up."""

    name: ClassVar[str] = "fastkv"
    paper: ClassVar[str] = "arXiv:2502.01068"

    window: int = whole(8, 1, MAX_WINDOW, "how many of the question's queries count at most, the last ones")
    pool: int = setting(7, "over how many neighbouring slots scores are smoothed; odd", check_pool)
    rate: float = number(0.2, 0, 1, "the share of visual tokens that goes on; 1: all", low_open=True)
    layer: int = whole(0, 0, 1024, "at whose input; 0: half way up")

    def reducer(self) -> InnerReducer | None:
        if self.rate == 1:
            return None
        return TokenPropagation(keep=self.rate, layer=self.layer, window=self.window, pool=self.pool)

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        most = max(budget.slots)
        return top_per_head(scores, [min(most, layer.shape[1]) for layer in scores])
