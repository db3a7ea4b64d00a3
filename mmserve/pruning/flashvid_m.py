"""FlashVID, inner part (arXiv 2602.08024): deep in the model, drop what the last prompt row looks past.

The paper lets its outer part keep 1.25 times the budget, and this part 0.3 of that from layer 20 of 28 on:
layers have the budget on average. With `--prune flashvid+flashvid_m`, `--keep` is that of the outer part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, at_depth, keep_top
from mmserve.pruning.settings import number, share_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashVIDInner(InnerMethod):
    """Keep the share `keep` with most attention of the layer before, mean over heads."""

    name: ClassVar[str] = "flashvid_m"
    paper: ClassVar[str] = "arXiv:2602.08024"
    acts_at: ClassVar[str] = "layer 20 of 28"

    keep: float = share_kept(0.3)
    depth: float = number(0.714, 0, 1, "behind which share of the layers it acts: 20 of 28", low_open=True)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return at_depth(self.depth, num_layers)

    def reduce(self, view: InnerView) -> Survivors:
        rows = keep_top(view, view.attention(1)[0], exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])
