"""No reduction: every token survives, whatever `keep` says; what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_keep
from mmserve.pruning.protect import gather_tokens
from mmserve.pruning.settings import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPruning:
    """Identity."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = False
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float = setting(1.0, "everything is kept, whatever it says")

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan(self, frames: int, tokens: int) -> int:
        return frames * tokens

    def reduce(self, item: VisualItem) -> Reduced:
        return gather_tokens(item, torch.arange(item.saliency.numel(), device=item.embeddings.device))
