"""Oracle: the attention over a union of disjoint key sets from the attention over each, fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of some rows over some keys; a row that saw no key is 0 with LSE -inf."""

    out: Tensor  # [..., d]
    lse: Tensor  # fp32 [...]: natural logarithm of the sum of exp(score)


def merge_lse(outs: Tensor, lses: Tensor) -> Partial:
    """outs [parts, ..., d] and lses [parts, ...] of disjoint key sets, in any order; the output is fp32.

    The output of a part with LSE -inf is never used, whatever it holds.
    """
    lse = torch.logsumexp(lses.float(), 0)
    weights = torch.exp(lses.float() - torch.where(lse == -torch.inf, 0.0, lse))[..., None]
    return Partial(torch.where(weights > 0, outs.float() * weights, 0.0).sum(0), lse)
