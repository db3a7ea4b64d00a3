"""Expected Attention (arXiv 2510.00636): what queries to come are expected to pay to each slot.

Queries of the prompt, before rotation, are taken for normally distributed; turned by the mean rotation of the
next positions they give the expected weight of a key in closed form. The question need not be known. Heads
share a layer's budget as in AdaKV (`floor` 1: alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmserve.kv.allocation import Selection, over_heads
from mmserve.kv.base import Budgeted, KVPolicy, LayerView
from mmserve.kv.observers import QueryMoments, expected_rotation
from mmserve.models.rope import rotate
from mmserve.pruning.settings import flag, number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedAttention(KVPolicy):
    """softmax(k R mean / sqrt(d) + k R covariance R' k' / 2d), mean over a group's heads, times |v|."""

    name: ClassVar[str] = "expected"
    paper: ClassVar[str] = "arXiv:2510.00636"

    future: int = whole(512, 1, 1 << 16, "over how many positions to come rotations are averaged")
    sink: int = whole(4, 0, 1024, "tokens at the beginning of the prompt that are left out")
    covariance: bool = flag(True, "whether the spread of queries counts")
    value_norm: bool = flag(True, "whether scores are multiplied with the norm of values")
    epsilon: float = number(0.0, 0, 1, "what is added to scores before that")
    floor: float = number(0.2, 0, 1, "the share of an even budget that every head is sure of")

    def observer(self) -> QueryMoments:
        return QueryMoments(self.sink)

    def scores(self, view: LayerView) -> Tensor:
        kv_heads, _, width = view.keys.shape
        if not view.sums:  # all of the prompt is left out
            return view.keys.new_full((kv_heads, len(view.visual_slots)), torch.inf, dtype=torch.float32)
        cos, sin = expected_rotation(view.frequencies, view.next_position, self.future)
        keys = view.keys.float()
        mean = rotate(view.sums["mean"], cos, sin).unflatten(0, (kv_heads, -1))  # [kv_heads, group, d]
        logits = mean @ keys.transpose(1, 2) * width**-0.5  # [kv_heads, group, S]
        if self.covariance:
            half = rotate(view.sums["covariance"], cos, sin).transpose(1, 2)
            spread = rotate(half, cos, sin).unflatten(0, (kv_heads, -1))
            logits += torch.stack([_spread(keys, part) for part in spread.unbind(1)], dim=1) / (2 * width)
        is_sink = view.order < self.sink
        scores: Tensor = logits.masked_fill(is_sink, -torch.inf).softmax(-1).mean(1)
        if self.value_norm:
            scores = (scores + self.epsilon) * view.values.float().norm(dim=-1)
        return scores.masked_fill(is_sink, torch.inf)[:, view.visual]

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        return over_heads(scores, budget.slots, self.floor)


def _spread(keys: Tensor, spread: Tensor) -> Tensor:
    """k S k' of keys [kv_heads, S, d] and one matrix [kv_heads, d, d] each: [kv_heads, S]."""
    found: Tensor = ((keys @ spread) * keys).sum(-1)
    return found
