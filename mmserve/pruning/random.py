"""Baseline: a random subset of the item's tokens.

The draw depends on the grid's size and a fixed seed alone, never on content or on earlier draws, so
that results repeat and can be cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_keep, exact_count
from mmserve.pruning.protect import gather_tokens, reduce_unprotected
from mmserve.pruning.settings import check_values, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPruning:
    """Keep `keep` of the tokens, drawn without replacement from the whole item."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float
    seed: int = whole(0, 0, 2**63 - 1, "another seed, another draw")

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_values(self)

    def plan(self, frames: int, tokens: int) -> int:
        return exact_count(self.keep, frames * tokens)

    def reduce(self, item: VisualItem) -> Reduced:
        return reduce_unprotected(item, self._reduce)

    def _reduce(self, item: VisualItem) -> Reduced:
        frames, tokens = item.saliency.shape
        rng = np.random.default_rng([self.seed, frames, tokens])
        drawn = rng.choice(frames * tokens, size=self.plan(frames, tokens), replace=False)
        return gather_tokens(item, torch.from_numpy(np.sort(drawn)).to(item.embeddings.device))
