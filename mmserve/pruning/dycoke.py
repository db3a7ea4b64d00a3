"""DyCoke's token merging in time (arXiv 2411.15024): drop what looks like an earlier frame of its group.

Of four frames the first is kept whole; the second loses what it shares with the first, the fourth what
it shares with the third, the third what it shares with the first. The paper's second stage, which
prunes the KV cache while decoding, is not part of this. Knows nothing about saliency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced, count_by_window
from mmserve.pruning.quotas import even_quotas
from mmserve.pruning.selection import top_of_rows
from mmserve.pruning.windowed import WindowedPruner, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class DyCoke(WindowedPruner):
    """Keep exactly max(N, floor(keep * T * N)) tokens of each window; a picture stays as it is.

    `keep` stands in for the share the paper drops of each frame: its 0.7 is a `keep` of 0.475. Unlike the
    published code, where the first frames of groups of four are more than the budget allows, groups
    double, each frame being compared with the one its last set bit earlier.
    """

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "arXiv:2411.15024"

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames, least=tokens)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        frames, tokens = saliency.shape
        group = 4
        while len(range(0, frames, group)) * tokens > budget:
            group *= 2
        times = np.arange(frames)
        whole, others = times[times % group == 0], times[times % group != 0]
        index, earlier = (torch.from_numpy(t).to(x.device) for t in (others, others & (others - 1)))
        similar = F.cosine_similarity(x[index], x[earlier], dim=2)
        changed = top_of_rows(-similar, even_quotas(len(others), budget - len(whole) * tokens))
        cells = torch.arange(frames * tokens, device=x.device).view(frames, tokens)
        first = cells[torch.from_numpy(whole).to(x.device)].flatten()
        return kept(x, torch.cat([first, cells[index].flatten()[changed]]).sort().values)
