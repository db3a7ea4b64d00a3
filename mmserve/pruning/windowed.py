"""Methods that reduce an item window by window: protected tokens set aside, each to its planned count.

Knows nothing about what a method does inside a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmserve.pruning.base import Modality, Reduced, VisualItem, check_keep, count_by_window, windows
from mmserve.pruning.protect import reduce_unprotected
from mmserve.pruning.settings import check_values, whole

# embeddings [T, N, D] in fp32 at least, saliency [T, N] and the count below T * N to what is left of them
ReduceWindow = Callable[[Tensor, Tensor, int], Reduced]


def window(default: int) -> int:
    """The field `window_frames`."""
    return whole(default, 0, 65536, "frames that are reduced together; 0: the whole item")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedPruner(ABC):
    """A method behind the vision tower that sees a window of frames at a time, and nothing of the question.

    It keeps exactly max(1, floor(keep * T * N)) tokens of each window, or at most so many. Where frames do
    not look at each other, `window_frames` only says over how many of them that is the count.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[Literal["encoder"]] = "encoder"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    keep: float
    window_frames: int = window(64)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_values(self)

    def plan(self, frames: int, tokens: int) -> int:
        return count_by_window(self.keep, frames, tokens, self.window_frames)

    def reduce(self, item: VisualItem) -> Reduced:
        return self._by_window(item, self._reduce_window)

    @abstractmethod
    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced: ...

    def _by_window(self, item: VisualItem, reduce: ReduceWindow) -> Reduced:
        """Apply `reduce` to every window that has more tokens than are planned for it."""
        return reduce_unprotected(item, lambda rest: self._reduce_each(rest, reduce))

    def _reduce_each(self, item: VisualItem, reduce: ReduceWindow) -> Reduced:
        frames, tokens, _ = item.embeddings.shape
        embeddings, source, weight = [], [], []
        for start, stop in windows(frames, self.window_frames):
            these = item.embeddings[start:stop]
            budget = self.plan(stop - start, tokens)
            if budget == (stop - start) * tokens:
                part = kept(these, torch.arange(budget, device=these.device))
            else:
                # averages of half-precision features drift
                x = these.to(torch.promote_types(these.dtype, torch.float32))
                part = reduce(x, item.saliency[start:stop], budget)
            assert len(part.source) == budget or (self.count == "bound" and len(part.source) < budget)
            embeddings.append(part.embeddings.to(these.dtype))
            source.append(part.source + start * tokens)
            weight.append(part.weight)
        return Reduced(embeddings=torch.cat(embeddings), source=torch.cat(source), weight=torch.cat(weight))


def kept(x: Tensor, source: Tensor) -> Reduced:
    """The tokens of a window [T, N, D] at flat positions `source` (ascending), as they are."""
    ones = torch.ones(len(source), dtype=torch.float32, device=x.device)
    return Reduced(embeddings=x.flatten(0, 1)[source], source=source, weight=ones)
