"""FrameFusion inside the language model (arXiv 2501.01986): merge from layer to layer, then prune once.

At the inputs of the first layers, tokens that show the same place of following frames and are alike become
their mean, at the first one's place, until few do; then the tokens stay that get most attention. Unlike the
published code, there are `merges` layers at most, the share to keep is that of the layers behind them instead
of all layers' mean, and attention is that of the question's last rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import exact_count
from mmserve.pruning.groups import group_by_head
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, keep_top
from mmserve.pruning.settings import number, share_kept, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFusionInner(InnerMethod):
    """Keep the share `keep`: the most similar are merged first, and no more than that asks for."""

    name: ClassVar[str] = "framefusion_m"
    paper: ClassVar[str] = "arXiv:2501.01986"
    acts_at: ClassVar[str] = "layers 0 to 3"

    keep: float = share_kept(0.3)
    similarity: float = number(0.6, -1, 1, "the least cosine at which two tokens of a place are merged")
    least: float = number(0.1, 0, 1, "merging is over when it takes a smaller share of the tokens")
    merges: int = whole(3, 1, 64, "layers at which tokens are merged at most; the next one prunes")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(min(self.merges, num_layers - 1) + 1)) if num_layers > 1 else ()

    def reduce(self, view: InnerView) -> Survivors:
        """What it remembers is whether merging is over."""
        count = exact_count(self.keep, view.entered)
        surplus = int(view.is_reducible.sum()) - count
        if surplus == 0:
            every = torch.arange(len(view.hidden), device=view.hidden.device)
            return Survivors(every, view.hidden, view.memory)
        is_last = view.stage == view.stages - 1
        if is_last or view.memory is not None:
            rows = keep_top(view, view.attention().mean(0), count)
            return Survivors(rows, view.hidden[rows], view.memory)
        rows, hidden = merge(view, self.similarity, surplus)
        merged = len(view.hidden) - len(rows)
        is_over = merged < self.least * (surplus + count)
        return Survivors(rows, hidden, torch.ones(1) if is_over else None)


def merge(view: InnerView, similarity: float, most: int) -> tuple[Tensor, Tensor]:
    """Rows that are left, and what they hold, when the `most` most similar neighbours at most are merged."""
    places = view.is_reducible.nonzero().flatten()
    # rows of a place one after the other, in the order of the frames
    places = places[view.patch[places].sort(stable=True).indices]
    tokens, patch = view.hidden[places].float(), view.patch[places]
    cosine = F.cosine_similarity(tokens[:-1], tokens[1:], dim=1)
    likely = (patch[:-1] == patch[1:]) & (cosine >= similarity)
    best = cosine.masked_fill(~likely, -torch.inf).sort(descending=True, stable=True).indices[:most]
    joined = likely & torch.zeros_like(likely).index_fill(0, best, True)
    first = torch.arange(1, len(places), device=places.device).masked_fill(joined, 0)
    head = torch.cat([first.new_zeros(1), first]).cummax(0).values
    groups = group_by_head(head)
    hidden = view.hidden.clone()
    hidden[places[groups.source]] = groups.mean(tokens).to(hidden.dtype)
    kept = ~view.is_reducible
    kept[places[groups.source]] = True
    rows = kept.nonzero().flatten()
    return rows, hidden[rows]
