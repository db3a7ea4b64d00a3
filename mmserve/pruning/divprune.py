"""DivPrune (arXiv 2503.02175): the most diverse tokens, by greedy max-min over cosine distances.

Each frame chooses for itself: unlike the published code, which compares all tokens of a prompt at once,
the cost stays linear in the number of frames. Knows neither saliency nor time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.diversity import max_min_order
from mmserve.pruning.quotas import even_quotas
from mmserve.pruning.selection import leading
from mmserve.pruning.windowed import WindowedPruner, kept, window


@dataclass(frozen=True, slots=True, kw_only=True)
class DivPrune(WindowedPruner):
    """The count of a window is shared evenly by its frames, which do not look at each other."""

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv:2503.02175"

    window_frames: int = window(8)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        quotas = even_quotas(len(x), budget)
        unit = F.normalize(x, dim=2)
        order = max_min_order(1 - unit @ unit.mT, int(quotas.max()))
        row, slot = leading(quotas, order.shape[1], x.device)
        return kept(x, (row * x.shape[1] + order[row, slot]).sort().values)
