"""VidCom2 (arXiv 2505.14454): keep what is least like the whole clip and its own frame.

Frames that stand out get more of the budget, and in each frame the tokens farthest from the two
centres survive. Knows nothing about saliency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced, floor_share
from mmserve.pruning.quotas import weighted_quotas
from mmserve.pruning.selection import top_of_rows
from mmserve.pruning.settings import number
from mmserve.pruning.windowed import WindowedPruner, kept

_BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class VidCom2(WindowedPruner):
    """Frames share the budget of a window by how much they stand out."""

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "arXiv:2505.14454"

    channels: float = number(
        0.5, 0, 1, "the share of channels compared, those of least variance", low_open=True
    )
    temperature: float = number(
        0.01, 1e-4, 1e4, "of the softmax that shares the budget: low gives more to frames that stand out"
    )

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        unit = F.normalize(self._stable_channels(x), dim=2)
        to_clip = _likeness(unit, unit.mean(dim=(0, 1), keepdim=True))
        to_frame = _likeness(unit, unit.mean(dim=1, keepdim=True))
        share = (-to_clip.mean(dim=1).double() / self.temperature).softmax(dim=0)
        weights = (1 + share - share.mean()).cpu().numpy()  # the only device-to-host copy
        quotas = weighted_quotas(weights, x.shape[1], budget)
        return kept(x, top_of_rows(-(to_clip + to_frame), quotas).sort().values)

    def _stable_channels(self, x: Tensor) -> Tensor:
        """The channels that vary least over all tokens, equal ones by index."""
        count = max(1, floor_share(self.channels, x.shape[2]))
        variance = x.flatten(0, 1).var(dim=0, correction=0)
        return x[..., variance.sort(stable=True).indices[:count].sort().values]


def _likeness(unit: Tensor, centre: Tensor) -> Tensor:
    """A sum of Gaussians of the distance to the centre, [T, N]."""
    squared = (unit - centre).square().sum(dim=2)
    return torch.stack([(-squared / (2 * width)).exp() for width in _BANDWIDTHS]).sum(dim=0)
