"""Baseline: tokens at an even stride over the whole item, blind to content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_keep, exact_count
from mmserve.pruning.protect import gather_tokens, reduce_unprotected


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPruning:
    """Keep `keep` of the tokens: the middle one of each of as many equal stretches."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan(self, frames: int, tokens: int) -> int:
        return exact_count(self.keep, frames * tokens)

    def reduce(self, item: VisualItem) -> Reduced:
        return reduce_unprotected(item, self._reduce)

    def _reduce(self, item: VisualItem) -> Reduced:
        total = item.saliency.numel()
        kept = self.plan(*item.saliency.shape)
        stretch = torch.arange(kept, device=item.embeddings.device)
        return gather_tokens(item, (2 * stretch + 1) * total // (2 * kept))
