"""DivPrune (arXiv 2503.02175): the most diverse tokens, by greedy max-min over cosine distances.

Each frame chooses for itself: unlike the published code, which compares all tokens of a prompt at once,
the cost stays linear in the number of frames. Knows neither saliency nor time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_count, check_keep, count_by_window
from mmserve.pruning.diversity import max_min_order
from mmserve.pruning.quotas import even_quotas
from mmserve.pruning.selection import leading
from mmserve.pruning.windowed import kept, reduce_by_window


@dataclass(frozen=True, slots=True, kw_only=True)
class DivPrune:
    """Keep exactly max(1, floor(keep * T * N)) tokens of each window, shared evenly by its frames.

    `window_frames` only says over how many frames the count is exact.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv:2503.02175"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float
    window_frames: int = 8

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count("window_frames", self.window_frames, 0, 65536)

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames)

    def reduce(self, item: VisualItem) -> Reduced:
        return reduce_by_window(self, item, self._reduce_window)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        quotas = even_quotas(len(x), budget)
        unit = F.normalize(x, dim=2)
        order = max_min_order(1 - unit @ unit.mT, int(quotas.max()))
        row, slot = leading(quotas, order.shape[1], x.device)
        return kept(x, (row * x.shape[1] + order[row, slot]).sort().values)
