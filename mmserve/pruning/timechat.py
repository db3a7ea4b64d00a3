"""TimeChat-Online's differential token drop (arXiv 2504.17343): what repeats the frame before is dropped.

The first frame of a window is kept whole where the budget has room for it. Unlike the published code, the
threshold on similarity is the one that meets the budget exactly; where the budget is smaller than a frame,
the first frame counts as unlike what was before, and saliency decides between its tokens. Knows nothing
about which positions were kept before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.windowed import WindowedPruner, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeChat(WindowedPruner):
    """What changed most since the frame before survives."""

    name: ClassVar[str] = "timechat"
    paper: ClassVar[str] = "arXiv:2504.17343"

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        change = 1 - F.cosine_similarity(x[:-1], x[1:], dim=2)
        first = torch.inf if budget >= x.shape[1] else 1.0
        score = torch.cat([change.new_full((1, x.shape[1]), first), change]).flatten()
        by_saliency = saliency.flatten().sort(descending=True, stable=True).indices
        best = score[by_saliency].sort(descending=True, stable=True).indices[:budget]
        return kept(x, by_saliency[best].sort().values)
