"""Elastic Cache (arXiv 2407.18121): what leaves is averaged into the nearest slot that stays.

All heads of a layer keep the same slots, by the attention that these received in all of the prompt. The
paper's elimination at a fixed point while an answer grows is not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView
from mmserve.kv.merging import averaged, nearest
from mmserve.kv.observers import AttentionSums


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticCache(KVPolicy):
    """Accumulated attention, the mean over all heads of a layer."""

    name: ClassVar[str] = "elastic"
    paper: ClassVar[str] = "arXiv:2407.18121"
    granularity: ClassVar[Literal["layer"]] = "layer"
    merges: ClassVar[bool] = True

    def observer(self) -> AttentionSums:
        return AttentionSums()

    def scores(self, view: LayerView) -> Tensor:
        received = view.sums["attention"][:, view.visual].mean(0)
        return received.expand(len(view.keys), -1)

    def merge(self, view: LayerView, head: int, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
        target = nearest(kept, evicted)
        return (
            averaged(view.keys[head], kept, evicted, target),
            averaged(view.values[head], kept, evicted, target),
        )
