"""HoliTom, inner part (arXiv 2505.21334): at a middle layer, merge what the last prompt row looks past.

The published code folds dropped tokens into kept ones one by one; here all at once, to the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, at_depth, keep_top
from mmserve.pruning.settings import number, share_kept

_BLOCK = 1024  # dropped tokens that are looked at together: tables are kept tokens times these


@dataclass(frozen=True, slots=True, kw_only=True)
class HoliTomMerge(InnerMethod):
    """Keep the share `keep` (1 - R) with most attention of layer k - 1, k being `depth` of the layers.

    Every other token, in order, becomes half of the kept one that is most like it: both averaged.
    """

    name: ClassVar[str] = "holitom_m"
    paper: ClassVar[str] = "arXiv:2505.21334"
    acts_at: ClassVar[str] = "layer 18 of 28"

    keep: float = share_kept(0.5)
    depth: float = number(0.643, 0, 1, "behind which share of the layers it acts: 18 of 28", low_open=True)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return at_depth(self.depth, num_layers)

    def reduce(self, view: InnerView) -> Survivors:
        rows = keep_top(view, view.attention(1)[0], exact_count(self.keep, view.entered))
        is_kept = torch.zeros_like(view.is_reducible)
        is_kept[rows] = True
        hidden = view.hidden[rows]
        absorbing = view.is_reducible[rows]
        dropped = view.hidden[view.is_reducible & ~is_kept]
        hidden[absorbing] = merge_into(hidden[absorbing], dropped)
        return Survivors(rows, hidden)


def merge_into(kept: Tensor, dropped: Tensor) -> Tensor:
    """Kept tokens [K, D] after each of `dropped` [M, D], in order, was averaged into the most similar one.

    Of the m tokens that one kept token takes, the i-th (from 1) has the share 2^-(m - i + 1), its own is
    2^-m. Similarity is the cosine before any of this.
    """
    wide, length = kept.float(), len(kept)
    unit = normalize(wide, dim=1).T
    blocks = dropped.float().split(_BLOCK)
    goal = torch.cat([(normalize(block, dim=1) @ unit).argmax(1) for block in blocks])
    taken = torch.bincount(goal, minlength=length)
    order = goal.argsort(stable=True)
    before = torch.arange(len(goal), device=goal.device) - (taken.cumsum(0) - taken)[goal[order]]
    share = torch.empty(len(goal), device=goal.device)
    share[order] = torch.exp2((before - taken[goal[order]]).float())
    merged = wide * torch.exp2(-taken.float())[:, None]
    slots = torch.arange(length, device=goal.device)[:, None]
    for block, goals, shares in zip(blocks, goal.split(_BLOCK), share.split(_BLOCK), strict=True):
        # a product rather than a scattered sum: on a GPU that would not repeat to the bit
        merged += (slots == goals) * shares @ block
    return merged.to(kept.dtype)
