"""How evicted slots are merged into those of a head that stay.

Knows nothing about scores or policies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def most_similar(keys: Tensor, kept: Tensor, evicted: Tensor) -> Tensor:
    """Of each evicted slot, the index among `kept` of the key [S, d] with the largest cosine, int64."""
    directions = functional.normalize(keys.float(), dim=-1)
    return (directions[evicted] @ directions[kept].T).argmax(-1)


def nearest(kept: Tensor, evicted: Tensor) -> Tensor:
    """Of each evicted slot, the index among `kept` of the slot that is nearest; the earlier of two."""
    after = torch.bucketize(evicted, kept).clamp(max=len(kept) - 1)
    before = (after - 1).clamp(min=0)
    is_before = (evicted - kept[before]).abs() <= (kept[after] - evicted).abs()
    return before.where(is_before, after)


def averaged(rows: Tensor, kept: Tensor, evicted: Tensor, target: Tensor) -> Tensor:
    """Kept rows of [S, d] as the mean of themselves and of what is evicted into them."""
    own = rows[kept].float()
    index = target[:, None].expand(-1, rows.shape[-1])
    return own.scatter_reduce(0, index, rows[evicted].float(), "mean").to(rows.dtype)


def pivoted(rows: Tensor, kept: Tensor, evicted: Tensor, target: Tensor) -> Tensor:
    """The same, where what is evicted was first drawn halfway to the row that it goes to."""
    own = rows[kept].float()
    drawn = (rows[evicted].float() + own[target]) / 2
    index = target[:, None].expand(-1, rows.shape[-1])
    return own.scatter_reduce(0, index, drawn, "mean").to(rows.dtype)
