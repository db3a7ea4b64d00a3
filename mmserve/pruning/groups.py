"""Averages over groups of tokens, in an order that no device changes.

Knows nothing about why tokens belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced


class Groups(NamedTuple):
    """Tokens by the token that stands for their group."""

    source: Tensor  # int64 [K], the tokens that stand for a group, ascending
    members: Tensor  # int64 [K]
    order: Tensor  # int64, the tokens of the first group by index, then those of the second, ...

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` [M, ...] in each group, [K, ...]."""
        # unlike scattered additions, which come in any order on a GPU
        starts = self.members.cumsum(0) - self.members
        rows = values.reshape(len(values), -1)
        return F.embedding_bag(self.order, rows, starts, mode="sum").view(-1, *values.shape[1:])

    def mean(self, values: Tensor) -> Tensor:
        members = self.members.view(-1, *[1] * (values.ndim - 1))
        return self.total(values) / members


def group_by_head(head: Tensor) -> Groups:
    """Tokens with the same `head` [M] are a group; a head is its own, a token with a negative one in none."""
    live = (head >= 0).nonzero()[:, 0]
    members = torch.bincount(head[live], minlength=len(head))
    source = members.nonzero()[:, 0]
    return Groups(source, members[source], live[head[live].argsort(stable=True)])


def merge_by_head(tokens: Tensor, head: Tensor) -> Reduced:
    """Average `tokens` [M, D] over their groups."""
    groups = group_by_head(head)
    return Reduced(
        embeddings=groups.mean(tokens), source=groups.source, weight=groups.members.to(torch.float32)
    )
