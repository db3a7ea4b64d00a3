"""EVS (arXiv 2510.14624): keep the tokens that changed most since the frame before.

The first frame of a window is kept whole, so that every position is seen once. Knows neither saliency
nor which positions were kept before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced, count_by_window
from mmserve.pruning.windowed import WindowedPruner, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class EVS(WindowedPruner):
    """Keep exactly max(N, floor(keep * T * N)) tokens of each window; a picture stays as it is.

    A token's score is one minus the cosine to the same position in the frame before; equal scores go by
    position.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "arXiv:2510.14624"

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames, least=tokens)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        change = 1 - F.cosine_similarity(x[:-1], x[1:], dim=2)
        score = torch.cat([torch.full_like(change[:1], torch.inf), change]).flatten()
        best = score.sort(descending=True, stable=True).indices[:budget]
        return kept(x, best.sort().values)
