"""FastV (arXiv 2403.06764): after the second layer, drop the visual tokens that the last one looks past.

The last prompt row is the one that the answer's first token is drawn from. Survivors keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors, at_layer, keep_top
from mmserve.pruning.settings import share_kept, whole

_LAYER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FastV(InnerMethod):
    """At the input of layer `layer` (K) keep the share `keep` (1 - R) with most attention of layer K - 1."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv:2403.06764"
    acts_at: ClassVar[str] = "layer 2"

    keep: float = share_kept(0.5)
    layer: int | None = whole(
        None, 1, 1024, "at whose input it acts; none: 2, or the last one of a shallower model"
    )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return at_layer(self.name, self.layer, _LAYER, num_layers)

    def reduce(self, view: InnerView) -> Survivors:
        rows = keep_top(view, view.attention(1)[0], exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])
