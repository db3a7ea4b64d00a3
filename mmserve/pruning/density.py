"""Density-peak clustering with k nearest neighbours (DPC-KNN), for many small groups of tokens at once.

Deterministic: equal densities and scores are decided by index, where published code adds random noise.
Knows nothing about frames, grids or budgets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


class Clusters(NamedTuple):
    """Centres in falling order of their score; entries past a group's own count are meaningless."""

    centre: Tensor  # int64 [G, C], index within the group
    merged: Tensor  # [G, C, D]
    members: Tensor  # [G, C], the centre included


def merge_clusters(tokens: Tensor, sizes: Ints, counts: Ints, *, neighbours: int, beta: float) -> Clusters:
    """Reduce the first `sizes[g]` of `tokens` [G, M, D] to `counts[g]` clusters in each group g.

    The distance is Euclidean over the square root of D. A centre becomes beta * centre + (1 - beta) *
    mean of the tokens assigned to it, or stays as it is without any.
    """
    size, count = (torch.from_numpy(numbers).to(tokens.device)[:, None] for numbers in (sizes, counts))
    valid = torch.arange(tokens.shape[1], device=tokens.device) < size  # [G, M]
    tokens = tokens * valid[..., None]
    squared = _squared_distances(tokens, valid)
    ranked = _peak_scores(squared, valid, count.clamp(max=neighbours), neighbours).sort(
        dim=1, descending=True, stable=True
    )
    slots = torch.arange(int(counts.max()), device=tokens.device)
    centre = ranked.indices[:, : len(slots)]  # [G, C]
    used = slots < count  # [G, C]

    to_centre = squared.gather(1, centre[..., None].expand(-1, -1, tokens.shape[1]))  # [G, C, M]
    nearest = to_centre.masked_fill(~used[..., None], torch.inf).argmin(dim=1)  # [G, M]
    loose = valid.scatter(1, centre, valid.gather(1, centre) & ~used)  # neither a centre nor padding
    assigned = ((nearest[:, None, :] == slots[:, None]) & loose[:, None, :]).to(tokens.dtype)  # [G, C, M]
    absorbed = assigned.sum(dim=2)
    heads = tokens.gather(1, centre[..., None].expand(-1, -1, tokens.shape[2]))
    mean = (assigned @ tokens) / absorbed.clamp(min=1)[..., None]
    merged = torch.where(absorbed[..., None] > 0, beta * heads + (1 - beta) * mean, heads)
    return Clusters(centre, merged, absorbed + 1)


def _squared_distances(tokens: Tensor, valid: Tensor) -> Tensor:
    """Squared distances [G, M, M] over D, infinite where either token is padding."""
    # distances do not change under a shift, and small values lose less to cancellation
    mean = tokens.sum(dim=1, keepdim=True) / valid.sum(dim=1)[:, None, None]
    centred = tokens - mean
    norms = centred.square().sum(dim=2)
    products = centred @ centred.mT
    # mutual neighbours must tie exactly, and a matrix product need not be symmetric to the last bit
    products = (products + products.mT) / 2
    squared = norms[:, :, None] + norms[:, None, :] - 2 * products
    squared = (squared / tokens.shape[2]).clamp(min=0)
    squared.diagonal(dim1=1, dim2=2).zero_()
    return squared.masked_fill(~(valid[:, :, None] & valid[:, None, :]), torch.inf)


def _peak_scores(squared: Tensor, valid: Tensor, neighbours: Tensor, max_neighbours: int) -> Tensor:
    """log(density * distance to the nearest denser token) [G, M], minus infinity for padding.

    In logarithms because the density exp(-mean squared distance) underflows for large features.
    """
    width = min(max_neighbours, squared.shape[2])
    near = squared.topk(width, dim=2, largest=False).values
    beyond = torch.arange(width, device=squared.device) >= neighbours  # [G, width]
    density = -near.masked_fill(beyond[:, None, :], 0).sum(dim=2) / neighbours
    density = density.masked_fill(~valid, -torch.inf)
    index = torch.arange(squared.shape[1], device=squared.device)
    denser = density[:, None, :] > density[:, :, None]  # [G, of, than]
    denser |= (density[:, None, :] == density[:, :, None]) & (index[None, :] < index[:, None])
    apart = squared.masked_fill(~denser, torch.inf).amin(dim=2)
    widest = squared.masked_fill(squared.isinf(), 0).amax(dim=(1, 2))
    apart = torch.where(denser.any(dim=2), apart, widest[:, None])
    return (density + 0.5 * apart.log()).masked_fill(~valid, -torch.inf)
