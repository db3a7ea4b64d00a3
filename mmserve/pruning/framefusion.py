"""FrameFusion (arXiv 2501.01986): merge what stays alike from frame to frame, then keep what matters.

Runs of a position over consecutive frames become their mean, at the first frame's place; the most salient
tokens of what is left fill the budget. Unlike the published code, it compares projected tokens once instead
of hidden states layer by layer, attention received in the tower stands for that in the language model, and
only as many tokens are merged as the budget asks for. Knows nothing about the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.groups import group_by_head
from mmserve.pruning.selection import marks
from mmserve.pruning.settings import number
from mmserve.pruning.windowed import WindowedPruner


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFusion(WindowedPruner):
    """The most similar are merged first. A merged token is as salient as its tokens are on average."""

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = "arXiv:2501.01986"

    similarity: float = number(
        0.6, -1, 1, "the least cosine at which a position is merged with the frame before"
    )

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        frames, tokens, _ = x.shape
        cosine = F.cosine_similarity(x[:-1], x[1:], dim=2)
        likely = cosine >= self.similarity
        ranked = cosine.masked_fill(~likely, -torch.inf).flatten().sort(descending=True, stable=True).indices
        # each merge of a position with the frame before removes one token
        joined = marks(ranked[: frames * tokens - budget], frames - 1, tokens) & likely
        frame = torch.arange(1, frames, device=x.device)[:, None]
        starts = torch.where(joined, 0, frame).cummax(dim=0).values
        starts = torch.cat([starts.new_zeros(1, tokens), starts])
        groups = group_by_head((starts * tokens + torch.arange(tokens, device=x.device)).flatten())
        salient = groups.mean(saliency.flatten()).sort(descending=True, stable=True).indices
        best = salient[:budget].sort().values
        return Reduced(
            embeddings=groups.mean(x.flatten(0, 1))[best],
            source=groups.source[best],
            weight=groups.members[best].to(torch.float32),
        )
