"""PruneVid, the part inside the language model (arXiv 2412.16117): keep what any word looks at in any head.

A token counts as much as the highest attention that a head pays to it from a row of the question. What is
dropped leaves the KV of the layers before as well. Unlike the published code, the best tokens of the whole
prompt are kept, not a share of each segment and frame, and of a long question only the last rows ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, at_depth, keep_top
from mmserve.pruning.settings import number, share_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneVidInner(InnerMethod):
    """Keep the share `keep` (alpha) with the highest attention of the layer before."""

    name: ClassVar[str] = "prunevid_m"
    paper: ClassVar[str] = "arXiv:2412.16117"
    acts_at: ClassVar[str] = "layer 11 of 32"
    drops_below: ClassVar[bool] = True

    keep: float = share_kept(0.4)
    depth: float = number(0.344, 0, 1, "behind which share of the layers it acts: 11 of 32", low_open=True)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return at_depth(self.depth, num_layers)

    def reduce(self, view: InnerView) -> Survivors:
        paid = view.head_attention().amax((0, 1))
        rows = keep_top(view, paid, exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])
