"""FastV (arXiv 2403.06764): after the second layer, drop the visual tokens that the last one looks past.

The last prompt row is the one that the answer's first token is drawn from. Survivors keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmserve.pruning.base import check_count, check_keep, exact_count
from mmserve.pruning.inner import InnerView, Survivors, keep_top


@dataclass(frozen=True, slots=True, kw_only=True)
class FastV:
    """At the input of layer `layer` (K) keep the share `keep` (1 - R) with most attention of layer K - 1."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv:2403.06764"
    needs_query: ClassVar[bool] = True
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[str] = "layer 2"
    count: ClassVar[Literal["exact"]] = "exact"
    trained_weights: ClassVar[bool] = False

    keep: float = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count("layer", self.layer, 1, 1024)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (min(self.layer, num_layers - 1),) if num_layers > 1 else ()

    def reduce(self, view: InnerView) -> Survivors:
        rows = keep_top(view, view.attention(1)[0], exact_count(self.keep, view.entered))
        return Survivors(rows, view.hidden[rows])
