"""Set protected tokens aside, reduce the rest as a smaller grid, and put both back in order.

Knows nothing about the methods that reduce the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmserve.pruning.base import Reduced, VisualItem


def gather_tokens(item: VisualItem, source: Tensor) -> Reduced:
    """Keep the tokens at flat positions `source` (ascending) as they are."""
    return Reduced(
        embeddings=item.embeddings.flatten(0, 1)[source],
        source=source,
        weight=torch.ones(len(source), dtype=torch.float32, device=source.device),
    )


def reduce_unprotected(item: VisualItem, reduce: Callable[[VisualItem], Reduced]) -> Reduced:
    """Apply `reduce` to the grid without its protected tokens; those survive with weight 1."""
    if item.protect is None or not bool(item.protect.any()):
        return reduce(item)
    marks = item.protect[0]
    assert bool((item.protect == marks).all()), "Expected the same protected positions in every frame"
    frames, tokens = item.saliency.shape
    cells = torch.arange(frames * tokens, device=item.embeddings.device).view(frames, tokens)
    fixed = gather_tokens(item, cells[:, marks].flatten())
    if len(fixed.source) == frames * tokens:
        return fixed
    inner = VisualItem(
        embeddings=item.embeddings[:, ~marks],
        saliency=item.saliency[:, ~marks],
        modality=item.modality,
        grids=item.grids,
    )
    rest = reduce(inner)
    return in_order(
        torch.cat([rest.embeddings, fixed.embeddings]),
        torch.cat([cells[:, ~marks].flatten()[rest.source], fixed.source]),
        torch.cat([rest.weight, fixed.weight]),
    )


def in_order(embeddings: Tensor, source: Tensor, weight: Tensor) -> Reduced:
    """Sort survivors, whose sources are distinct, into the order of the original layout."""
    source, order = torch.sort(source)
    return Reduced(embeddings=embeddings[order], source=source, weight=weight[order])
