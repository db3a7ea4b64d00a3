"""VL-Cache (arXiv 2410.23317): layers whose question looks at many slots get more of the budget.

Scores and budgets come from the text after the last item. The paper counts all slots; here text stays, so
the budget is shared out among visual ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmserve.kv.allocation import Selection, shared, top_per_head, with_recent
from mmserve.kv.base import Budgeted, KVPolicy, LayerView, visible
from mmserve.kv.policies.snapkv import MAX_WINDOW, question_attention
from mmserve.pruning.settings import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class VLCache(KVPolicy):
    """Accumulated attention of the question; a layer weighs as much as its attention is dense."""

    name: ClassVar[str] = "vl_cache"
    paper: ClassVar[str] = "arXiv:2410.23317"
    needs_query: ClassVar[bool] = True
    needs_all_layers: ClassVar[bool] = True
    granularity: ClassVar[Literal["head"]] = "head"

    window: int = whole(50, 1, MAX_WINDOW, "how many of the question's queries count at most, the last ones")
    threshold: float = number(0.01, 0, 1, "attention below this share of a row's largest counts as none")
    recent: float = number(0.1, 0, 1, "the share of a layer's budget that its newest visual slots get")
    least: float = number(0.01, 0, 1, "the share of its visual slots that every layer keeps")

    def scores(self, view: LayerView) -> Tensor:
        attention = view.left["attention"] = question_attention(self.name, view, self.window)
        return attention.sum(-2).mean(1)[:, view.visual]

    def weight(self, view: LayerView) -> float:
        """The share of what rows see that they look at, by the mean over rows' entries and heads."""
        attention = view.left["attention"]
        # what a row does not see it pays nothing to, so it never counts
        looked = (attention >= self.threshold * attention.amax(-1, keepdim=True)) & (attention > 0)
        seen = visible(view.query_order[-self.window :], view.order)
        heads = attention.shape[0] * attention.shape[1]
        return float(looked.sum()) / (heads * int(seen.sum()))

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        caps = [layer.shape[1] for layer in scores]
        slots = shared(sum(budget.slots), budget.weights, caps, least=self.least)
        ranked = [
            with_recent(layer, int(self.recent * count + 1e-6))
            for layer, count in zip(scores, slots, strict=True)
        ]
        return top_per_head(ranked, slots)
