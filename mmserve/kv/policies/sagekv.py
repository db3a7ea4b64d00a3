"""SAGE-KV (arXiv 2503.08879): one selection per head by what the last token looks at.

The paper keeps the beginning and the newest tokens too: in a prompt with media these are text, which stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmserve.kv.allocation import Selection, top_per_head, with_recent
from mmserve.kv.base import Budgeted, KVPolicy, LayerView
from mmserve.kv.policies.snapkv import question_attention
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class SageKV(KVPolicy):
    """Attention of the prompt's last query, the mean over a group's heads, top slots per KV head."""

    name: ClassVar[str] = "sagekv"
    paper: ClassVar[str] = "arXiv:2503.08879"
    needs_query: ClassVar[bool] = True

    recent: float = number(0.0, 0, 1, "the share of the budget that the newest visual slots get")

    def scores(self, view: LayerView) -> Tensor:
        return question_attention(self.name, view, 1)[..., 0, :].mean(1)[:, view.visual]

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        recent = (int(self.recent * count + 1e-6) for count in budget.slots)
        best = [with_recent(layer, count) for layer, count in zip(scores, recent, strict=True)]
        return top_per_head(best, budget.slots)
