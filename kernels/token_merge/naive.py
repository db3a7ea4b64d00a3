"""Oracles of token merging: fp32 torch, any device, one clip or group at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Clusters(NamedTuple):
    """Packed over all tokens, int32 [N]: numbers within a group."""

    rank: Tensor  # place of a token's score, 0 the best; below the group's count it is a centre
    cluster: Tensor  # the rank of its centre, a centre's own


def frame_cosine(x: Tensor, clips: Tensor) -> Tensor:
    """As `token_merge.frame_cosine`."""
    cosine = torch.full(x.shape[:1], -torch.inf, device=x.device)
    for first, frames, width in clips.tolist():
        clip = x[first : first + frames * width].float().view(frames, width, -1)
        links = functional.cosine_similarity(clip[:-1], clip[1:], dim=2)
        cosine[first : first + links.numel()] = links.flatten()
    return cosine


def run_lengths(cosine: Tensor, clips: Tensor, *, tau: float) -> Tensor:
    """As `token_merge.run_lengths`."""
    runs = torch.zeros(cosine.shape, dtype=torch.int32, device=cosine.device)
    for first, frames, width in clips.tolist():
        clip, links = (part[first : first + frames * width].view(frames, width) for part in (runs, cosine))
        for frame in range(frames - 2, -1, -1):
            clip[frame] = torch.where(links[frame] > tau, clip[frame + 1] + 1, 0)
    return runs


def cluster_tokens(x: Tensor, begins: Tensor, counts: Tensor, *, neighbours: int) -> Clusters:
    """As `token_merge.cluster_tokens`."""
    rank, cluster = (torch.zeros(len(x), dtype=torch.int32, device=x.device) for _ in range(2))
    ends = begins.tolist()
    for first, last, count in zip(ends[:-1], ends[1:], counts.tolist(), strict=True):
        if first < last:
            group = slice(first, last)
            rank[group], cluster[group] = _cluster(x[group].float(), count, neighbours)
    return Clusters(rank, cluster)


def merge_weights(clusters: Clusters, begins: Tensor, weights: Tensor, *, beta: float) -> Tensor:
    """As `token_merge.merge_weights`."""
    shares = torch.zeros_like(weights)
    ends = begins.tolist()
    for first, last in pairwise(ends):
        rank, cluster = (part[first:last].long() for part in clusters)
        loose = torch.where(rank == cluster, 0.0, weights[first:last])
        totals = torch.zeros(last - first, device=weights.device).index_add_(0, cluster, loose)[cluster]
        own = torch.where(totals > 0, beta, 1.0)
        shares[first:last] = torch.where(rank == cluster, own, (1 - beta) * loose / totals.clamp(min=1e-30))
    return shares


def scatter_merge(x: Tensor, begins: Tensor, cluster: Tensor, shares: Tensor, *, max_count: int) -> Tensor:
    """As `token_merge.scatter_merge`, but fp32."""
    merged = torch.zeros(len(begins) - 1, max_count, x.shape[1], device=x.device)
    ends = begins.tolist()
    for group, (first, last) in enumerate(pairwise(ends)):
        rows = x[first:last].float() * shares[first:last, None]
        merged[group].index_add_(0, cluster[first:last].long(), rows)
    return merged


def squared_distances(tokens: Tensor) -> Tensor:
    """Squared distances [M, M] over D of fp32 tokens [M, D], symmetric to the last bit."""
    # distances do not change under a shift, and small values lose less to cancellation
    centred = tokens - tokens[0]
    norms = centred.square().sum(1)
    products = (centred @ centred.T).triu()
    products = products + products.triu(1).T
    squared = (norms[:, None] + norms[None, :] - 2 * products) / tokens.shape[1]
    return squared.clamp(min=0).fill_diagonal_(0)


def _cluster(tokens: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    squared = squared_distances(tokens)
    index = torch.arange(len(tokens), device=tokens.device)
    nearest = max(1, min(neighbours, count, len(tokens)))
    density = -squared.topk(nearest, largest=False).values.mean(1)
    denser = density[None, :] > density[:, None]
    denser |= (density[None, :] == density[:, None]) & (index[None, :] < index[:, None])
    apart = torch.where(denser.any(1), squared.masked_fill(~denser, torch.inf).amin(1), squared.amax())
    score = density + 0.5 * apart.log()
    rank = score.argsort(descending=True, stable=True).argsort()
    centres = (rank < count).nonzero().flatten()
    centres = centres[rank[centres].argsort()]
    cluster = squared[:, centres].argmin(1)
    return rank.int(), torch.where(rank < count, rank, cluster).int()
