"""Greedy max-min selection: the next token is always the one farthest from all that are chosen.

Knows nothing about what a distance means.
"""

from __future__ import annotations

import torch
from torch import Tensor


def max_min_order(distances: Tensor, count: int) -> Tensor:
    """The first `count` choices in each group of `distances` [G, M, M] as indices [G, count].

    How far candidate j is from a chosen i is at [i, j], which need not be what is at [j, i]. Begins with
    the token whose nearest neighbour is farthest; equal ones go by index. Each step costs one row of
    distances: a running minimum over the chosen is kept.
    """
    groups = torch.arange(len(distances), device=distances.device)
    nearest = distances.diagonal_scatter(distances.new_full(distances.shape[:2], torch.inf), 0, 1, 2).amin(1)
    chosen = [nearest.argmax(dim=1)]
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distances[groups, chosen[-1]])
        # none is chosen twice, not even where all tokens are alike
        nearest[groups, chosen[-1]] = -torch.inf
        chosen.append(nearest.argmax(dim=1))
    return torch.stack(chosen, dim=1)
