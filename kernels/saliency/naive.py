"""Oracle: the attention each token of a picture receives in one layer, fp32, one picture at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def saliency(q: Tensor, k: Tensor, begins: Tensor, *, scale: float) -> Tensor:
    """As `saliency.saliency`."""
    received = torch.zeros(len(q), device=q.device)
    ends = begins.tolist()
    for first, last in pairwise(ends):
        scores = torch.einsum("rhd,khd->hrk", q[first:last].float(), k[first:last].float()) * scale
        received[first:last] = torch.softmax(scores, -1).mean((0, 1)) if last > first else 0
    return received
