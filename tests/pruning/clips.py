"""What tests of reduction methods share: clips to reduce, and comparison with a literal implementation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from operator import mul

import pytest
import torch
from torch import Tensor

from mmserve.pruning.base import Reduced, VisualItem

Row = tuple[int, Tensor, int | Fraction]  # source, embedding, weight


def clip(seed: int, frames: int, tokens: int, dim: int = 6, noise: float = 0.25) -> VisualItem:
    """Scenes with still backgrounds, changing patches and cuts; saliency with many ties."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    cuts = (torch.rand(frames, generator=rng) < 0.25).cumsum(0)
    scenes = normal(frames + 1, tokens, dim)
    busy = torch.rand(frames + 1, tokens, 1, generator=rng, dtype=torch.float64) ** 3
    embeddings = scenes[cuts] + (noise + 2 * busy[cuts]) * normal(frames, tokens, dim)
    saliency = (torch.rand(frames, tokens, generator=rng) * 5).round() / 5
    return VisualItem(embeddings=embeddings, saliency=saliency)


def cosine(a: Tensor, b: Tensor) -> float:
    """Nothing is like a zero vector."""
    one, other = a.tolist(), b.tolist()
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(mul, one, other)) / lengths if lengths else 0.0


def even(groups: int, budget: int) -> list[int]:
    """Shares of groups that are filled as an even line would, rounded half up."""
    filled = [math.floor(Fraction(i * budget, groups) + Fraction(1, 2)) for i in range(groups + 1)]
    return [after - before for before, after in pairwise(filled)]


def density_clusters(tokens: dict[int, Tensor], count: int, neighbours: int) -> dict[int, list[int]]:
    """The other members of each cluster by its centre: DPC-KNN."""
    k = min(neighbours, count)
    apart = {(p, q): float((tokens[p] - tokens[q]).square().mean()) for p in tokens for q in tokens}
    rho = {p: math.exp(-sum(sorted(apart[p, q] for q in tokens)[:k]) / k) if k else 0.0 for p in tokens}
    delta = {}
    for p in tokens:
        above = [apart[p, q] for q in tokens if rho[q] > rho[p] or (rho[q] == rho[p] and q < p)]
        delta[p] = math.sqrt(min(above) if above else max(apart.values()))
    centres = sorted(tokens, key=lambda p: (-rho[p] * delta[p], p))[:count]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for p in tokens:
        if centres and p not in members:
            members[min(centres, key=lambda c: apart[p, c])].append(p)
    return members


def proportional(sizes: list[int], budget: int) -> list[int]:
    """Shares in proportion to sizes, what is left to the largest fractions."""
    shares = [Fraction(size * budget, sum(sizes)) for size in sizes]
    quotas = [math.floor(share) for share in shares]
    rest = sorted(range(len(sizes)), key=lambda g: (quotas[g] - shares[g], g))[: budget - sum(quotas)]
    return [quota + (g in rest) for g, quota in enumerate(quotas)]


def budget_of(item: VisualItem, keep: float) -> int:
    return max(1, math.floor(Fraction(str(keep)) * item.saliency.numel()))


def most_salient(item: VisualItem, t: int, among: Iterable[int], count: int) -> list[int]:
    return sorted(among, key=lambda n: (-float(item.saliency[t, n]), n))[:count]


def assert_same(ours: Reduced, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    assert ours.source.tolist() == [source for source, _, _ in rows]
    assert ours.weight.tolist() == pytest.approx([float(weight) for _, _, weight in rows])
    torch.testing.assert_close(
        ours.embeddings, torch.stack([value for _, value, _ in rows]), rtol=0, atol=1e-6
    )


def assert_identical(a: Reduced, b: Reduced) -> None:
    assert torch.equal(a.embeddings, b.embeddings)
    assert torch.equal(a.source, b.source)
    assert torch.equal(a.weight, b.weight)
