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

from mmserve.pruning.selection import leading

Ints = npt.NDArray[np.int64]

# entries of the distance tables built at once by `cluster_rows`: 1 MiB in fp32, to stay in the caches
_MAX_DISTANCES = 2**18


class Peaks(NamedTuple):
    """Centres in falling order of their score; entries past a group's own count are meaningless."""

    centre: Tensor  # int64 [G, C], index within the group
    cluster: Tensor  # int64 [G, M], slot of each token's centre, padding's meaningless


class Clusters(NamedTuple):
    """Centres in falling order of their score; entries past a group's own count are meaningless."""

    centre: Tensor  # int64 [G, C], index within the group
    merged: Tensor  # [G, C, D]
    members: Tensor  # [G, C], the centre included


def density_peaks(tokens: Tensor, sizes: Ints, counts: Ints, *, neighbours: int) -> Peaks:
    """Assign the first `sizes[g]` of `tokens` [G, M, D] to `counts[g]` centres among them in each group g.

    The distance is Euclidean over the square root of D.
    """
    valid, used = _shapes(tokens, sizes, counts)
    count = torch.from_numpy(counts).to(tokens.device)[:, None]
    squared = _squared_distances(tokens * valid[..., None], valid)
    ranked = _peak_scores(squared, valid, count.clamp(max=neighbours), neighbours).sort(
        dim=1, descending=True, stable=True
    )
    slots = torch.arange(used.shape[1], device=tokens.device)
    centre = ranked.indices[:, : len(slots)]  # [G, C]
    to_centre = squared.gather(1, centre[..., None].expand(-1, -1, tokens.shape[1]))  # [G, C, M]
    nearest = to_centre.masked_fill(~used[..., None], torch.inf).argmin(dim=1)  # [G, M]
    # a centre is its own, even where another one is just as near
    own = torch.where(used, slots, nearest.gather(1, centre))
    return Peaks(centre, nearest.scatter(1, centre, own))


def merge_clusters(tokens: Tensor, sizes: Ints, counts: Ints, *, neighbours: int, beta: float) -> Clusters:
    """Reduce the first `sizes[g]` of `tokens` [G, M, D] to `counts[g]` clusters in each group g.

    A centre becomes beta * centre + (1 - beta) * mean of the tokens assigned to it, or stays as it is
    without any.
    """
    centre, cluster = density_peaks(tokens, sizes, counts, neighbours=neighbours)
    valid, used = _shapes(tokens, sizes, counts)
    tokens = tokens * valid[..., None]
    slots = torch.arange(used.shape[1], device=tokens.device)
    loose = valid.scatter(1, centre, valid.gather(1, centre) & ~used)  # neither a centre nor padding
    assigned = ((cluster[:, None, :] == slots[:, None]) & loose[:, None, :]).to(tokens.dtype)  # [G, C, M]
    absorbed = assigned.sum(dim=2)
    heads = tokens.gather(1, centre[..., None].expand(-1, -1, tokens.shape[2]))
    mean = (assigned @ tokens) / absorbed.clamp(min=1)[..., None]
    merged = torch.where(absorbed[..., None] > 0, beta * heads + (1 - beta) * mean, heads)
    return Clusters(centre, merged, absorbed + 1)


def cluster_rows(tokens: Tensor, group: Ints, counts: Ints, *, neighbours: int) -> Tensor:
    """For each of `tokens` [K, D] the index of its cluster's centre, int64 [K].

    Those of group g fall into `counts[g]` clusters, at most as many as they are; without any it is -1.
    """
    sizes = np.bincount(group, minlength=len(counts))
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    head = torch.from_numpy(np.where(counts[group] > 0, np.arange(len(group)), -1)).to(tokens.device)
    # tables are as wide as their largest group, so that groups of like size go together
    live = np.flatnonzero((counts > 0) & (counts < sizes))
    live = live[np.argsort(-sizes[live], kind="stable")]
    while len(live):
        width = int(sizes[live[0]])
        batch, live = np.split(live, [max(1, _MAX_DISTANCES // width**2)])
        table = order[(starts[batch, None] + np.arange(width)).clip(max=len(order) - 1)]
        position = torch.from_numpy(table).to(tokens.device)  # [G, M]
        peaks = density_peaks(tokens[position], sizes[batch], counts[batch], neighbours=neighbours)
        row, column = leading(sizes[batch], width, tokens.device)
        centre = position.gather(1, peaks.centre)[row, peaks.cluster[row, column]]
        head[position[row, column]] = centre
    return head


def _shapes(tokens: Tensor, sizes: Ints, counts: Ints) -> tuple[Tensor, Tensor]:
    """Which entries are tokens [G, M] and which are centres [G, C]."""
    size, count = (torch.from_numpy(numbers).to(tokens.device)[:, None] for numbers in (sizes, counts))
    rows, slots = (
        torch.arange(width, device=tokens.device) for width in (tokens.shape[1], int(counts.max()))
    )
    return rows < size, slots < count


def peak_scores(tokens: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """Scores by which DPC-KNN chooses centres among the tokens [G, M, D] marked `valid` [G, M]."""
    squared = _squared_distances(tokens * valid[..., None], valid)
    return _peak_scores(squared, valid, valid.sum(dim=1, keepdim=True).clamp(max=neighbours), neighbours)


def _squared_distances(tokens: Tensor, valid: Tensor) -> Tensor:
    """Squared distances [G, M, M] over D, infinite where either token is padding."""
    # distances do not change under a shift, and small values lose less to cancellation
    mean = tokens.sum(dim=1, keepdim=True) / valid.sum(dim=1)[:, None, None]
    centred = tokens - mean
    norms: Tensor = torch.linalg.vector_norm(centred, dim=2).square()
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
    scores = (density + 0.5 * apart.log()).clamp(min=torch.finfo(density.dtype).min)
    return scores.masked_fill(~valid, -torch.inf)
