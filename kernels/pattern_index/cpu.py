"""The probe on a CPU: products in bf16, one KV head at a time, so that weights stay in the caches.

Knows nothing about patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmserve.kernels.pattern_index.naive import Probe


def is_available(q: Tensor, k: Tensor) -> bool:
    """Whether `probe` runs these: the oracle is for what has to be exact."""
    return q.dtype is k.dtype is torch.bfloat16 and q.device.type == k.device.type == "cpu"


def probe(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None, *, scale: float) -> Probe:
    """As `pattern_index.probe`, of scores rounded to bf16."""
    rows, heads, _ = q.shape
    keys, kv_heads = k.shape[:2]
    order = torch.arange(keys, dtype=torch.int32) if key_order is None else key_order
    # keys are in order: only the last ones are hidden from any row
    begin = int(torch.searchsorted(order, row_order.min(), right=True))
    hidden = order[begin:] > row_order[:, None]
    vertical, slash = torch.empty(heads, keys), torch.empty(heads, keys)
    # row r is written rows - 1 - r places to the right, so that diagonals are columns
    shifted = torch.zeros(rows, keys + rows)
    weights = shifted.as_strided((rows, keys), (keys + rows - 1, 1), rows - 1)
    scaled = q * scale
    for kv_head in range(kv_heads):
        own = k[:, kv_head].T
        for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
            scores = scaled[:, head] @ own
            scores[:, begin:].masked_fill_(hidden, -torch.inf)
            # a row that sees nothing has weights of nan
            weights.copy_(torch.softmax(scores, -1, dtype=torch.float32).nan_to_num_(0.0))
            vertical[head] = weights.sum(0)
            slash[head] = shifted.sum(0)[:keys].flip(0)
    return Probe(vertical, slash)
