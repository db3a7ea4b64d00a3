"""Reduce an item window by window: protected tokens set aside, each window down to its planned count.

Knows nothing about what a method does inside a window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmserve.pruning.base import Pruner, Reduced, VisualItem, window_frames, windows
from mmserve.pruning.protect import reduce_unprotected

# embeddings [T, N, D] in fp32 at least, saliency [T, N] and the count below T * N to what is left of them
ReduceWindow = Callable[[Tensor, Tensor, int], Reduced]


def reduce_by_window(pruner: Pruner, item: VisualItem, reduce: ReduceWindow) -> Reduced:
    """Apply `reduce` to every window that has more tokens than `pruner` plans for it."""
    return reduce_unprotected(item, lambda rest: _reduce(pruner, rest, reduce))


def kept(x: Tensor, source: Tensor) -> Reduced:
    """The tokens of a window [T, N, D] at flat positions `source` (ascending), as they are."""
    ones = torch.ones(len(source), dtype=torch.float32, device=x.device)
    return Reduced(embeddings=x.flatten(0, 1)[source], source=source, weight=ones)


def _reduce(pruner: Pruner, item: VisualItem, reduce: ReduceWindow) -> Reduced:
    frames, tokens, _ = item.embeddings.shape
    embeddings, source, weight = [], [], []
    for start, stop in windows(frames, window_frames(pruner)):
        whole = item.embeddings[start:stop]
        budget = pruner.plan(stop - start, tokens)
        if budget == (stop - start) * tokens:
            part = kept(whole, torch.arange(budget, device=whole.device))
        else:
            # averages of half-precision features drift
            x = whole.to(torch.promote_types(whole.dtype, torch.float32))
            part = reduce(x, item.saliency[start:stop], budget)
        assert len(part.source) == budget or (pruner.count == "bound" and len(part.source) < budget)
        embeddings.append(part.embeddings.to(whole.dtype))
        source.append(part.source + start * tokens)
        weight.append(part.weight)
    return Reduced(embeddings=torch.cat(embeddings), source=torch.cat(source), weight=torch.cat(weight))
