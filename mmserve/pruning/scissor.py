"""LLaVA-Scissor (arXiv 2506.21862): one token for each connected component of similar tokens.

Components are found in each frame, then among their means over all frames; every token is at last averaged
into the mean it is most like. Unlike the published code, components are exact instead of sampled, the
threshold of the second stage is the one that leaves an exact count, and a mean always keeps the token of
its component that is most like it, at whose place the merged token stands. Knows no saliency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.groups import group_by_head, merge_by_head
from mmserve.pruning.linkage import components, spanning_trees
from mmserve.pruning.settings import number
from mmserve.pruning.windowed import WindowedPruner, window

_ROWS = 256  # of a table of similarities computed at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Scissor(WindowedPruner):
    """Connects the most similar tokens first, and no more than the budget asks for.

    Costs grow with the square of the tokens of a window.
    """

    name: ClassVar[str] = "scissor"
    paper: ClassVar[str] = "arXiv:2506.21862"

    tau: float = number(0.9, -1, 1, "the cosine above which tokens of a frame are connected")
    window_frames: int = window(8)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        unit = F.normalize(x, dim=2)
        head = _components(unit, budget, self.tau)
        local = group_by_head(head)
        means = local.mean(x.flatten(0, 1))
        if len(means) > budget:
            joined = _components(F.normalize(means, dim=1)[None], budget, -torch.inf)
            means = group_by_head(joined).mean(means)
            head = local.source[joined][torch.searchsorted(local.source, head)]
        return merge_by_head(x.flatten(0, 1), _nearest(unit.flatten(0, 1), F.normalize(means, dim=1), head))


def _components(unit: Tensor, count: int, threshold: float) -> Tensor:
    """A token of each token's component as a flat position [G * M], of `unit` [G, M, D].

    Connects what is more alike than `threshold` in each group, until `count` components are left.
    """
    trees = spanning_trees(_similarities(unit).cpu().numpy())
    edges = min(trees.strength.size - count, int((trees.strength > threshold).sum()))
    return torch.from_numpy(components(trees, edges)).to(unit.device)


def _similarities(unit: Tensor) -> Tensor:
    """Cosines [G, M, M], those of a large group half computed and half mirrored."""
    groups, tokens, _ = unit.shape
    table = unit.new_empty(groups, tokens, tokens)
    for start in range(0, tokens, _ROWS):
        stop = start + _ROWS
        rows = unit[:, start:stop] @ unit[:, :stop].mT
        table[:, start:stop, :stop] = rows
        table[:, :stop, start:stop] = rows.mT
    return table


def _nearest(unit: Tensor, means: Tensor, head: Tensor) -> Tensor:
    """For each token the one that stands for the mean it is most like.

    `means` [K, D] are those of the groups by `head`, and like `unit` [M, D] of unit length.
    """
    similar = unit @ means.mT  # [M, K]
    group = head.unique(return_inverse=True)[1]
    by_likeness = similar.gather(1, group[:, None])[:, 0].sort(descending=True, stable=True).indices
    by_group = by_likeness[group[by_likeness].argsort(stable=True)]
    members = torch.bincount(group)
    core = by_group[members.cumsum(0) - members]
    nearest = core[similar.argmax(dim=1)]
    nearest[core] = core
    return nearest
