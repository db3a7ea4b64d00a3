"""TimeChat-Online's differential token drop (arXiv 2504.17343): what repeats the frame before is dropped.

The first frame of a window is kept whole where the budget has room for it. Unlike the published code, the
threshold on similarity is the one that meets the budget exactly; where the budget is smaller than a frame,
the first frame counts as unlike what was before, and saliency decides between its tokens. Knows nothing
about which positions were kept before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_count, check_keep, count_by_window
from mmserve.pruning.windowed import kept, reduce_by_window


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeChat:
    """Keep exactly max(1, floor(keep * T * N)) tokens of each window of `window_frames` frames."""

    name: ClassVar[str] = "timechat"
    paper: ClassVar[str] = "arXiv:2504.17343"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float
    window_frames: int = 64

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count("window_frames", self.window_frames, 0, 65536)

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames)

    def reduce(self, item: VisualItem) -> Reduced:
        return reduce_by_window(self, item, self._reduce_window)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        change = 1 - F.cosine_similarity(x[:-1], x[1:], dim=2)
        first = torch.inf if budget >= x.shape[1] else 1.0
        score = torch.cat([change.new_full((1, x.shape[1]), first), change]).flatten()
        by_saliency = saliency.flatten().sort(descending=True, stable=True).indices
        best = score[by_saliency].sort(descending=True, stable=True).indices[:budget]
        return kept(x, by_saliency[best].sort().values)
