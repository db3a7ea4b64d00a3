"""ToMe (arXiv 2210.09461): bipartite soft matching, the most similar pairs of tokens merged in rounds.

Acts on the projected tokens of each frame, after the tower and not inside it. Unlike the published code,
similarity is that of embeddings instead of attention keys, no attention is weighted by size, tokens stay in
the order of the picture, and the rounds end at an exact count. Knows neither saliency nor time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.groups import group_by_head, merge_by_head
from mmserve.pruning.quotas import even_quotas
from mmserve.pruning.settings import whole
from mmserve.pruning.windowed import WindowedPruner, window


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMe(WindowedPruner):
    """The count of a window is shared evenly by its frames, which do not look at each other.

    Rounds are added where one, which halves a frame at most, cannot do its share.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "arXiv:2210.09461"

    rounds: int = whole(8, 1, 64, "in each of so many rounds as many tokens are merged")
    window_frames: int = window(8)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        frames, tokens, _ = x.shape
        quotas = even_quotas(frames, budget)
        head = torch.full((frames, tokens), -1, device=x.device)
        for count in np.unique(quotas[quotas > 0]).tolist():  # two at most
            chosen = torch.from_numpy(np.flatnonzero(quotas == count)).to(x.device)
            some = x[chosen]
            head[chosen] = chosen[:, None] * tokens + _merge_to(some @ some.mT, count, self.rounds)
        return merge_by_head(x.flatten(0, 1), head.flatten())


def _merge_to(products: Tensor, count: int, rounds: int) -> Tensor:
    """The head of each token [G, N] when `count` are left, from inner products of tokens [G, N, N]."""
    groups, left, _ = products.shape
    own = torch.arange(left, device=products.device).expand(groups, -1)
    source, head = own, own
    while left > count:
        merges = min(-(-(left - count) // rounds), left // 2)
        rounds = max(1, rounds - 1)
        gone, into = _closest_pairs(products, merges)
        step = own.scatter(1, source.gather(1, gone), source.gather(1, into))
        head = step.gather(1, head)
        # places in what is left: a token that is gone stands where its partner stands
        place = torch.arange(groups * left, device=products.device).view(groups, left)
        stays = group_by_head(place.scatter(1, gone, place.gather(1, into)).flatten())
        source = source.flatten()[stays.source].view(groups, -1)
        left -= merges
        # a product with a sum is a sum of products
        rows = stays.total(products.flatten(0, 1)).view(groups, left, -1)
        products = stays.total(rows.mT.flatten(0, 1)).view(groups, left, left)
    return head


def _closest_pairs(products: Tensor, merges: int) -> tuple[Tensor, Tensor]:
    """Tokens at even places most like one at an odd place, and those at the odd places, [G, merges] each."""
    # rounding may leave less than nothing where tokens cancel out
    length = products.diagonal(dim1=1, dim2=2).clamp(min=1e-24).sqrt()
    cosine = products[:, 0::2, 1::2] / (length[:, 0::2, None] * length[:, None, 1::2])
    best, partner = cosine.max(dim=2)
    closest = best.sort(dim=1, descending=True, stable=True).indices[:, :merges]
    return 2 * closest, 2 * partner.gather(1, closest) + 1
