"""SparseVLM (arXiv 2410.04417): words that concern the picture rate its tokens; the best losers are recycled.

The paper derives how many go from the rank of the attention; here the count is exact, so that pages and
batches can be planned. Its three stages then keep nearly what the published settings keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmserve.pruning.base import exact_count
from mmserve.pruning.density import cluster_rows
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, keep_top
from mmserve.pruning.settings import share_kept

_STAGES = (3, 7, 16)  # of 32 layers
_DEPTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVLM(InnerMethod):
    """Thin out in three stages, by the same factor each, until the share `keep` is left.

    Raters are the words behind the last item that the visual embeddings point at more than at the average
    word. Of the tokens that a stage drops, the best 30 % come back as a tenth as many: cluster means.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv:2410.04417"
    acts_at: ClassVar[str] = "layers 3, 7 and 16 of 32"

    keep: float = share_kept(0.33)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Before the first one raters are chosen; shallow models have fewer stages."""
        inside = {min(max(round(stage * num_layers / _DEPTH), 1), num_layers - 1) for stage in _STAGES}
        return (0, *sorted(inside)) if num_layers > 1 else ()

    def reduce(self, view: InnerView) -> Survivors:
        if view.stage == 0:
            every = torch.arange(len(view.hidden), device=view.hidden.device)
            return Survivors(every, view.hidden, raters(view))
        assert view.memory is not None, "raters were chosen before the first layer"
        count = exact_count(self.keep ** (view.stage / (view.stages - 1)), view.entered)
        present = int(view.is_reducible.sum())
        clusters = recycled(present, count)
        paid = view.attention()
        # of a long question only the last words are observed
        rating = view.memory[-len(paid) :]
        scores = (paid[rating] if bool(rating.any()) else paid).mean(0)
        rows = keep_top(view, scores, count - clusters)
        if clusters == 0:
            return Survivors(rows, view.hidden[rows], view.memory)
        centres, means = recycle(view, scores, rows, clusters)
        every = torch.cat([rows, centres])
        order = every.argsort()
        hidden = torch.cat([view.hidden[rows], means])[order]
        return Survivors(every[order], hidden, view.memory)


def raters(view: InnerView) -> Tensor:
    """Which rows behind the last item rate, bool [rows]."""
    after = int(view.is_visual.nonzero().max()) + 1
    words = view.hidden[after:].float()
    if len(words) == 0:
        return torch.ones(1, dtype=torch.bool, device=words.device)
    pointed_at = (view.hidden[view.is_reducible].float() @ words.T).softmax(1).mean(0)
    return pointed_at > pointed_at.mean()


def recycled(present: int, count: int) -> int:
    """How many of `count` survivors of `present` tokens are clusters of what was dropped."""
    clusters = 0
    while clusters < count - 1 and clusters < _clusters(present - count + clusters):
        clusters += 1
    return clusters


def _clusters(dropped: int) -> int:
    return (dropped * 3 // 10 + 1) // 10 + 1 if dropped > 0 else 0


def recycle(view: InnerView, scores: Tensor, rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Rows of cluster centres among what was dropped, and the means of their clusters."""
    gone = view.is_reducible.clone()
    gone[rows] = False
    places = gone.nonzero().flatten()
    best = scores[places].sort(descending=True, stable=True).indices[: len(places) * 3 // 10 + 1]
    places = places[best.sort().values]
    tokens = view.hidden[places].float()
    group, counts = np.zeros(len(places), np.int64), np.array([clusters])
    head = cluster_rows(tokens, group, counts, neighbours=clusters)
    centres = head.unique()
    members = (centres[:, None] == head).to(tokens.dtype)
    means = members @ tokens / members.sum(1, keepdim=True)
    return places[centres], means.to(view.hidden.dtype)
