"""STTM (arXiv 2507.07990): like tokens of a frame become larger quadtree nodes, like nodes of two frames one.

A node forms where its four parts are like it; a node then joins the one it overlaps and is most like in the
frame before. Unlike the published code, it acts on projected tokens before the language model, a node forms
only of whole nodes, one threshold meets the budget, with that over time a fixed step below it, and the last
merges go by rank, so that the count is exact. Knows no saliency.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmserve.pruning.base import Reduced, VisualItem
from mmserve.pruning.groups import merge_by_head
from mmserve.pruning.quadtree import Grids, Ints, Quadtree, grids_of, quadtree
from mmserve.pruning.settings import number
from mmserve.pruning.windowed import WindowedPruner

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

_BISECTIONS = 16
_EPS = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class STTM(WindowedPruner):
    """The thresholds of the paper are 0.8 to 0.85 in space and 0.55 to 0.65 over time.

    A merged token is the mean of all of its tokens and stands at the place of the first.
    """

    name: ClassVar[str] = "sttm"
    paper: ClassVar[str] = "arXiv:2507.07990"

    step: float = number(0.2, 0, 2, "how much lower the cosine may be between frames than within one")

    def reduce(self, item: VisualItem) -> Reduced:
        return self._by_window(item, partial(self._reduce_window, grids=item.grids))

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int, grids: Grids | None = None) -> Reduced:
        tree = quadtree(grids_of(x.shape[1], grids))
        likeness = _likeness(x, tree)
        formed = likeness.within >= self._threshold(likeness, tree, budget)
        if _active(formed, tree).sum() >= budget:
            head = _join(likeness, tree, formed, budget)
        else:
            head = _form(likeness, tree, budget)
        return merge_by_head(x.flatten(0, 1), torch.from_numpy(head.flatten()).to(x.device))

    def _threshold(self, likeness: _Likeness, tree: Quadtree, budget: int) -> float:
        """The highest threshold within frames, as bisection tells, that leaves at most `budget` tokens."""
        low, high = -2.0, 2.0 + self.step  # all is merged, nothing is
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            active = _active(likeness.within >= middle, tree)
            joined = likeness.best(active) >= middle - self.step
            low, high = (middle, high) if active.sum() - joined.sum() <= budget else (low, middle)
        return low


class _Likeness(NamedTuple):
    """Cosines between the nodes of T frames, on the host."""

    within: Floats  # [T, K], the least below a node between a part and its whole; infinite for tokens
    to_parent: Floats  # [T, K], 0 for the root
    between: Floats  # [T - 1, P], of overlapping nodes of consecutive frames
    later: Ints  # [P], ascending
    earlier: Ints  # [P], ascending for the same later node

    @property
    def starts(self) -> Ints:
        """The first pair of each later node; every node overlaps itself."""
        return np.flatnonzero(np.diff(self.later, prepend=-1))

    def pairs(self, active: Bools) -> Floats:
        """Cosines of pairs [T - 1, P] of which both nodes are active, minus infinity for others."""
        both = active[1:, self.later] & active[:-1, self.earlier]
        return np.where(both, self.between, -np.inf)

    def best(self, active: Bools) -> Floats:
        """That of each node to the active one before that it is most like, [T - 1, K]."""
        return np.maximum.reduceat(self.pairs(active), self.starts, axis=1)


def _likeness(x: Tensor, tree: Quadtree) -> _Likeness:
    """Of sums instead of means, which point the same way."""
    sums, lengths, to_parent = x, [_length(x)], []
    for table in tree.levels:
        parts = _parts(sums, table)
        sums = parts.sum(dim=2)
        products = (parts @ sums[..., None])[..., 0]
        lengths.append(_length(sums))
        to_parent.append(products / (_parts(lengths[-2], table).clamp(min=_EPS) * lengths[-1][..., None]))

    later, earlier = (torch.from_numpy(nodes).to(x.device) for nodes in tree.overlaps())
    # a product of sums is a sum of products, so that those of tokens are enough
    between = _node_sums(_node_sums(x[1:] @ x[:-1].mT, tree).mT, tree).flatten(1)
    length = torch.cat(lengths, dim=1)
    between = between[:, earlier * length.shape[1] + later] / (length[1:, later] * length[:-1, earlier])
    return _Likeness(
        *_by_node([cosine.cpu().numpy() for cosine in to_parent], tree, len(x)),
        between.cpu().numpy(),
        *tree.overlaps(),
    )


def _by_node(cosines: list[Floats], tree: Quadtree, frames: int) -> tuple[Floats, Floats]:
    """The least cosine below each node and that to its parent [T, K], from those of parts by level."""
    within = [np.full((frames, _tokens(tree)), np.inf)]
    to_parent = np.zeros((frames, len(tree.parent)))
    below = 0
    for cosine, table in zip(cosines, tree.levels, strict=True):
        exists = table >= 0
        to_parent[:, below + table[exists]] = cosine[:, exists]
        below += within[-1].shape[1]
        least = np.minimum(cosine, within[-1][:, table])
        within.append(np.where(exists, least, np.inf).min(axis=2))
    return np.concatenate(within, axis=1), to_parent


def _parts(level: Tensor, table: Ints) -> Tensor:
    """The parts of each node of the next level, [T, n, 4, ...], zero where there is none."""
    parts = level[:, torch.from_numpy(table.clip(min=0)).to(level.device)]
    if (table < 0).any():
        parts[:, torch.from_numpy(table < 0).to(level.device)] = 0
    return parts


def _node_sums(values: Tensor, tree: Quadtree) -> Tensor:
    """Sums of `values` [T, N, ...] over the tokens of each node, [T, K, ...]."""
    levels = [values]
    for table in tree.levels:
        levels.append(_parts(levels[-1], table).sum(dim=2))
    return torch.cat(levels, dim=1)


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=2)
    return length.clamp(min=_EPS)


def _active(formed: Bools, tree: Quadtree) -> Bools:
    """Formed nodes [T, K] that are not part of a larger one."""
    return formed & ~(formed[:, tree.parent] & (tree.parent >= 0))


def _join(likeness: _Likeness, tree: Quadtree, formed: Bools, budget: int) -> Ints:
    """Heads of tokens [T, N] in `budget` groups: nodes are as `formed`, the best links are made."""
    frames, nodes = formed.shape
    active = _active(formed, tree)
    best = likeness.best(active)
    ranked = np.argsort(-best, axis=None, kind="stable")[: int(active.sum()) - budget]
    joined = np.zeros_like(active[1:])
    joined.flat[ranked] = True
    is_best = likeness.pairs(active) == best[:, likeness.later]
    # the first of equally good ones
    partner = np.minimum.reduceat(np.where(is_best, likeness.earlier, nodes - 1), likeness.starts, axis=1)
    own = np.arange(frames * nodes).reshape(frames, nodes)
    roots = [own[0]]
    for t in range(1, frames):
        roots.append(np.where(joined[t - 1], roots[-1][partner[t - 1]], own[t]))
    frame, node = np.divmod(np.take_along_axis(np.stack(roots), _node_of_token(formed, tree), axis=1), nodes)
    return frame * _tokens(tree) + tree.first[node]


def _form(likeness: _Likeness, tree: Quadtree, budget: int) -> Ints:
    """Heads of tokens [T, N] with `budget` groups, where the best nodes are formed and nothing is linked.

    Of the last one only as many parts are merged as it takes, those most like the whole.
    """
    frames, tokens = len(likeness.within), _tokens(tree)
    limit = frames * tokens - budget
    scores = likeness.within[:, tokens:].T  # parts before wholes, where they score the same
    ranked = np.argsort(-scores, axis=None, kind="stable")
    saved = np.repeat(tree.children[tokens:] - 1, frames)[ranked].cumsum()
    whole = int(np.searchsorted(saved, limit, side="right"))
    formed_by_node = np.zeros(scores.shape, dtype=np.bool_)
    formed_by_node.flat[ranked[:whole]] = True
    formed = np.concatenate([np.ones((frames, tokens), dtype=np.bool_), formed_by_node.T], axis=1)
    node = _node_of_token(formed, tree)
    head = np.arange(frames)[:, None] * tokens + tree.first[node]
    rest = limit - (int(saved[whole - 1]) if whole else 0)
    if rest:
        last, t = divmod(int(ranked[whole]), frames)
        parts = np.flatnonzero(tree.parent == tokens + last)
        chosen = parts[np.argsort(-likeness.to_parent[t, parts], kind="stable")[: rest + 1]]
        head[t, np.isin(node[t], chosen)] = t * tokens + tree.first[chosen].min()
    return head


def _node_of_token(formed: Bools, tree: Quadtree) -> Ints:
    """The largest formed node around each token, [T, N]."""
    node = np.broadcast_to(np.arange(_tokens(tree)), (len(formed), _tokens(tree)))
    for _ in tree.levels:
        above = tree.parent[node]
        grows = (above >= 0) & np.take_along_axis(formed, above, axis=1)
        node = np.where(grows, above, node)
    return node


def _tokens(tree: Quadtree) -> int:
    return int((tree.children == 0).sum())
