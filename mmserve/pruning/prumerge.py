"""PruMerge (arXiv 2403.15388): keep outliers of saliency, merge their nearest neighbours into them.

How many tokens stand out depends on the picture, so `keep` is a bound here. Unlike the published code,
saliency stands for the attention of a class token and embeddings for the tower's keys, and a merged
token is an average, its own weight included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.selection import leading, marked_columns, marks
from mmserve.pruning.settings import flag, whole
from mmserve.pruning.windowed import WindowedPruner, window


@dataclass(frozen=True, slots=True, kw_only=True)
class PruMerge(WindowedPruner):
    """Keep at most max(1, floor(keep * T * N)) tokens of each window, at least one.

    Of each frame those stay whose saliency is above Q3 + 1.5 * (Q3 - Q1), the most salient one in any
    case; of more than the bound, the most salient. Each takes in the dropped tokens most like it, weighted
    by saliency.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "arXiv:2403.15388"
    count: ClassVar[Literal["exact", "bound"]] = "bound"

    plus: bool = flag(False, "fill the bound with tokens at an even stride")
    neighbours: int = whole(32, 1, 4096, "how many dropped tokens of its frame each one takes in")
    window_frames: int = window(8)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        salient = saliency.to(x.dtype).clamp(min=0)
        chosen = _outliers(salient, budget)
        if self.plus:
            chosen = _fill(chosen, budget)
        return self._merge(x, salient, chosen)

    def _merge(self, x: Tensor, salient: Tensor, chosen: Tensor) -> Reduced:
        """Average each chosen token [T, N] with its neighbours among the others of its frame."""
        counts = chosen.sum(dim=1).cpu().numpy()
        row, slot = leading(counts, int(counts.max()), x.device)
        head, used = marked_columns(chosen, counts)
        unit = F.normalize(x, dim=2)
        heads = unit.gather(1, head[..., None].expand(-1, -1, x.shape[2]))
        loose = ~chosen[:, None, :] & used[..., None]
        similar = (heads @ unit.mT).masked_fill(~loose, -torch.inf)  # [T, C, N]
        farthest = similar.topk(min(self.neighbours, x.shape[1]), dim=2).values[..., -1:]
        # neighbours that are equally near are all taken; those of no saliency add nothing
        share = torch.where(loose & (similar >= farthest), salient[:, None, :], 0)

        position = head[row, slot]
        own, sums, total = salient[row, position], (share @ x)[row, slot], share.sum(dim=2)[row, slot]
        alone = x[row, position]
        merged = (own[:, None] * alone + sums) / (own + total).clamp(min=1e-30)[:, None]
        taken = share > 0
        # a token that several take counts in parts
        parts = taken / taken.sum(dim=1, keepdim=True).clamp(min=1)
        return Reduced(
            embeddings=torch.where(total[:, None] > 0, merged, alone),
            source=row * x.shape[1] + position,
            weight=1 + parts.sum(dim=2)[row, slot].to(torch.float32),
        )


def _outliers(salient: Tensor, budget: int) -> Tensor:
    """Marks [T, N] of at most `budget` tokens that stand out in their frame, equal ones by position."""
    levels = torch.tensor([0.25, 0.75], dtype=salient.dtype, device=salient.device)
    low, high = salient.quantile(levels, dim=1)
    above: Tensor = salient > (high + 1.5 * (high - low))[:, None]
    stands_out = above.scatter(1, salient.argmax(dim=1, keepdim=True), True)
    score = salient.masked_fill(~stands_out, -1).flatten()
    best = score.sort(descending=True, stable=True).indices[:budget]
    return stands_out & marks(best, *salient.shape)


def _fill(chosen: Tensor, budget: int) -> Tensor:
    """Add tokens at an even stride of those not chosen until there are `budget`."""
    rest = np.flatnonzero(~chosen.cpu().numpy())
    missing = budget - (chosen.numel() - len(rest))
    added = rest[(2 * np.arange(missing) + 1) * len(rest) // (2 * max(missing, 1))]
    return chosen | marks(torch.from_numpy(added).to(chosen.device), *chosen.shape)
