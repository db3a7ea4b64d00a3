"""FlashVID, outer part (arXiv 2602.08024): salient and diverse tokens stay, others become trees over time.

Each frame keeps tokens that are far apart, weighted by saliency. Every other token hangs on the one it is
most like in the frame before, wherever that stands; a tree becomes its mean, and trees in excess are
clustered in their frames. Unlike the published code, the count is exact, no surplus is kept for a later
stage to prune, no token is both kept and part of a tree, and saliency alone weighs distances, not also how
much a token is like the frames' means. Knows nothing about the language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.density import cluster_rows
from mmserve.pruning.diversity import max_min_order
from mmserve.pruning.groups import group_by_head
from mmserve.pruning.protect import in_order
from mmserve.pruning.quotas import Ints, even_quotas, exact_quotas
from mmserve.pruning.selection import leading, marks
from mmserve.pruning.settings import number, whole
from mmserve.pruning.windowed import WindowedPruner, kept


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashVID(WindowedPruner):
    """A token hangs on others within its segment only; cuts are made where frames are least alike."""

    name: ClassVar[str] = "flashvid"
    paper: ClassVar[str] = "arXiv:2602.08024"

    diverse: float = number(0.7, 0, 1, "the share of the kept tokens that stay as they are")
    tau: float = number(0.8, -1, 1, "the cosine above which a token hangs on one of the frame before")
    tau_segment: float = number(0.9, -1, 1, "the clip is cut where frame means have a lower cosine")
    segments: int = whole(8, 1, 65536, "the least number of segments")
    neighbours: int = whole(7, 1, 64, "the K of DPC-KNN")

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        unit = F.normalize(x, dim=2)
        share = Fraction(repr(float(self.diverse)))
        quotas = np.array([math.ceil(share * quota) for quota in even_quotas(len(x), budget).tolist()])
        diverse = _diverse(unit, saliency, quotas)
        rest = ~marks(diverse, *saliency.shape)
        if len(diverse) == budget:
            return kept(x, diverse.sort().values)
        head = self._roots(x.mean(dim=1), unit, rest, rest.numel() - budget)
        values, source, weight = self._trees(x, head, budget - len(diverse))
        return in_order(
            torch.cat([x.flatten(0, 1)[diverse], values]),
            torch.cat([diverse, source]),
            torch.cat([torch.ones_like(diverse, dtype=torch.float32), weight]),
        )

    def _roots(self, means: Tensor, unit: Tensor, rest: Tensor, limit: int) -> Tensor:
        """The root of each token's tree as a flat position [T * N], -1 for tokens not in `rest` [T, N].

        At most `limit` links are made, the most similar ones; each is one token less.
        """
        frames, tokens = rest.shape
        best, parent = (unit[1:] @ unit[:-1].mT).masked_fill(~rest[:-1, None, :], -torch.inf).max(dim=2)
        allowed = rest[1:] & (best > self.tau) & ~self._cuts(means)[:, None]
        ranked = best.masked_fill(~allowed, -torch.inf).flatten().sort(descending=True, stable=True).indices
        joined = allowed & marks(ranked[:limit], frames - 1, tokens)
        own = torch.arange(frames * tokens, device=rest.device).view(frames, tokens)
        roots = [own[0]]
        for t in range(1, frames):
            roots.append(torch.where(joined[t - 1], roots[-1][parent[t - 1]], own[t]))
        return torch.stack(roots).masked_fill(~rest, -1).flatten()

    def _trees(self, x: Tensor, head: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values, sources and weights of `budget` trees, those in excess clustered in their roots' frames."""
        frames, tokens, _ = x.shape
        trees = group_by_head(head)
        values, members = trees.mean(x.flatten(0, 1)), trees.members.to(x.dtype)
        frame = (trees.source // tokens).cpu().numpy()
        sizes = np.bincount(frame, minlength=frames)
        quotas = exact_quotas(sizes, np.zeros_like(sizes), budget)
        clusters = group_by_head(cluster_rows(values, frame, quotas, neighbours=self.neighbours))
        weight = clusters.total(members).to(torch.float32)
        return clusters.mean(values), trees.source[clusters.source], weight

    def _cuts(self, means: Tensor) -> Tensor:
        """Whether a segment ends between two frames, bool [T - 1]."""
        means = F.normalize(means, dim=1)
        alike = (means[1:] * means[:-1]).sum(dim=1)
        least = alike.sort(stable=True).indices[: self.segments - 1]
        return (alike < self.tau_segment).index_fill(0, least, True)


def _diverse(unit: Tensor, saliency: Tensor, counts: Ints) -> Tensor:
    """Flat positions of `counts[t]` salient tokens of each frame that are far apart."""
    order = max_min_order((1 - unit @ unit.mT) * saliency[:, None, :], max(1, int(counts.max())))
    row, slot = leading(counts, order.shape[1], unit.device)
    return row * unit.shape[1] + order[row, slot]
