"""Causal bf16 attention on a CPU as products of blocks, each small enough for the cache.

torch's flash kernel for CPUs multiplies bf16 at a third of the speed of its matrix products; here the
scores of a few rows against all keys are one product, one softmax and one product again.
Knows nothing about pages or sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 3 << 20  # scores of one block: with less, the calls cost more than the caches gain
MIN_ROWS, MAX_ROWS = 8, 128


def blocked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs [n, group, d] of the last n positions: row i of q [n, group, d] sees keys [0, S - n + i].

    k and v are [S, d], S >= n. Scores are rounded to the dtype of q before the softmax, as in every
    product of that dtype. Subtracting the mean key changes no softmax (each row of scores moves by a
    constant) and keeps the scores small, so that little is lost (SageAttention, arXiv 2410.02367, 3.2).
    """
    rows, group, width = q.shape
    older = len(k) - rows
    k = (k - k.mean(0)).T
    block = max(MIN_ROWS, min(MAX_ROWS, BLOCK_BYTES // (group * len(v) * q.itemsize)))
    scaled = (q * width**-0.5).contiguous()
    out = torch.empty_like(scaled)
    buffer = torch.empty(group * min(block, rows) * len(v), dtype=q.dtype)
    hidden = torch.ones(block, block, dtype=torch.bool).triu(1)[:, None]
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        count, seen = stop - start, older + stop
        scores = buffer[: count * group * seen].view(count * group, seen)
        torch.mm(scaled[start:stop].view(-1, width), k[:, :seen], out=scores)
        own = scores.view(count, group, seen)[..., seen - count :]
        own.masked_fill_(hidden[:count, :, :count], -torch.inf)
        torch.softmax(scores, -1, out=scores)
        torch.mm(scores, v[:seen], out=out[start:stop].view(-1, width))
    return out
