"""VisionZip (arXiv 2412.04467): the most salient tokens as they are, the rest merged into a few.

Each frame keeps its dominant tokens; of the others, targets at an even stride take in those most like
them. Unlike the published code, saliency stands for the attention of a class token, embeddings for the
tower's keys, the stride leaves no end of a frame without targets, and a merged token is a plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.absorption import assign_by_cosine
from mmserve.pruning.base import Reduced
from mmserve.pruning.protect import in_order
from mmserve.pruning.quotas import Ints, even_quotas
from mmserve.pruning.selection import leading, marked_columns, marks, top_of_rows
from mmserve.pruning.settings import number
from mmserve.pruning.windowed import WindowedPruner, window


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionZip(WindowedPruner):
    """The count of a window is shared evenly by its frames.

    What is not kept for its saliency is merged. Frames do not look at each other.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv:2412.04467"

    dominant: float = number(54 / 64, 0, 1, "the share of the kept tokens that are chosen by saliency")
    window_frames: int = window(8)

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        quotas = even_quotas(len(x), budget)
        num_dominant = np.floor(quotas * self.dominant + 0.5).astype(np.int64)
        dominant = top_of_rows(saliency, num_dominant)
        rest = ~marks(dominant, *saliency.shape)
        targets, values, weight = _merge(x, rest, quotas - num_dominant)
        return in_order(
            torch.cat([x.flatten(0, 1)[dominant], values]),
            torch.cat([dominant, targets]),
            torch.cat([torch.ones_like(dominant, dtype=torch.float32), weight]),
        )


def _merge(x: Tensor, rest: Tensor, counts: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens marked in `rest` [T, N] into `counts[t]` of them in each frame.

    Returns flat positions of these targets, means of each with the tokens assigned to it, and how many
    tokens those are.
    """
    is_target = _evenly(rest, counts)
    column, used = marked_columns(is_target, counts)
    unit = F.normalize(x, dim=2)
    heads = unit.gather(1, column[..., None].expand(-1, -1, x.shape[2]))
    assigned = assign_by_cosine(heads, used, unit, rest & ~is_target)
    frame, slot = leading(counts, column.shape[1], x.device)
    position = column[frame, slot]
    members = assigned.sum(dim=2)[frame, slot] + 1
    mean = (x[frame, position] + (assigned @ x)[frame, slot]) / members[:, None]
    return frame * x.shape[1] + position, mean, members.to(torch.float32)


def _evenly(rest: Tensor, counts: Ints) -> Tensor:
    """Marks [T, N] of `counts[t]` of the tokens marked in `rest`, at an even stride in each frame."""
    count = torch.from_numpy(counts).to(rest.device)[:, None]
    rank = rest.cumsum(dim=1) - 1
    left = rest.sum(dim=1, keepdim=True).clamp(min=1)
    # the j-th of c targets among m tokens is the one of rank floor(j * m / c)
    return rest & (-rank * count % left < count)
