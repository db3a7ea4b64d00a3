"""FrameFusion (arXiv 2501.01986): merge what stays alike from frame to frame, then keep what matters.

Runs of a position over consecutive frames become their mean, at the first frame's place; the most salient
tokens of what is left fill the budget. Unlike the published code, it compares projected tokens once instead
of hidden states layer by layer, attention received in the tower stands for that in the language model, and
only as many tokens are merged as the budget asks for. Knows nothing about the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import (
    Modality,
    Reduced,
    VisualItem,
    check_count,
    check_keep,
    check_range,
    count_by_window,
)
from mmserve.pruning.groups import group_by_head
from mmserve.pruning.selection import marks
from mmserve.pruning.windowed import reduce_by_window


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFusion:
    """Keep exactly max(1, floor(keep * T * N)) tokens of each window of `window_frames` frames.

    `similarity` is the least cosine at which a position is merged with itself in the frame before; the
    most similar are merged first. A merged token is as salient as its tokens are on average.
    """

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = "arXiv:2501.01986"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float
    similarity: float = 0.6
    window_frames: int = 64

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("similarity", self.similarity, -1, 1)
        check_count("window_frames", self.window_frames, 0, 65536)

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames)

    def reduce(self, item: VisualItem) -> Reduced:
        return reduce_by_window(self, item, self._reduce_window)

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
