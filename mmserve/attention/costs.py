"""What the tiles of an index cost, head by head, so that patterns can be compared at equal cost.

The kernel's own time where it was measured here, else a count of products. Knows nothing about patterns.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.prefill_attention import AttentionIndex, prefill_attention
from mmserve.kernels.prefill_attention.cpu_tiles import is_available
from mmserve.kernels.prefill_attention.index import Tile, pack_tiles

ROUNDS = 5
MEASURED_KEYS = 4096
FEW_ROWS = 8


class Costs(NamedTuple):
    """Of one tile: `key` per key that is gathered, `product` per row and key."""

    key: float
    product: float
    kind: Literal["measured", "counted"]

    def of(self, index: AttentionIndex, heads: int) -> NDArray[np.float64]:
        """The cost of every query head."""
        tiles = index.tiles.cpu().numpy().astype(np.int64)
        runs = np.concatenate([[0], np.cumsum(index.runs[:, 2].cpu().numpy())])
        keys = runs[tiles[:, 4] + tiles[:, 5]] - runs[tiles[:, 4]]
        keys += tiles[:, 7] * index.block_size + tiles[:, 9]
        cost = keys * (self.key + self.product * tiles[:, 3])
        return np.bincount(tiles[:, 1], cost, heads).astype(np.float64)


# a key costs as much to gather as 16 products
COUNTED = Costs(16.0, 1.0, "counted")


def measure(q: Tensor, k: Tensor, v: Tensor) -> Costs:
    """Seconds of the kernel on tensors [n, Hq, d] and [S, Hkv, d]; counted where only the oracle runs."""
    is_native = backend_for(q.device) != "naive" or is_available(q, k)
    if not is_native or len(q) < 4 * FEW_ROWS or len(k) < FEW_ROWS:
        return COUNTED
    keys, rows = min(len(k), MEASURED_KEYS), min(len(q), 128)
    few, many = (_seconds(q, k, v, count, keys) / keys for count in (FEW_ROWS, rows))
    product = max((many - few) / (rows - FEW_ROWS), 1e-15)
    return Costs(max(few - FEW_ROWS * product, 0.0), product, "measured")


def _seconds(q: Tensor, k: Tensor, v: Tensor, rows: int, keys: int) -> float:
    """Of one tile of so many rows and keys, as one of as many as there are heads."""
    heads = q.shape[1]
    index = pack_tiles(
        [Tile(0, head, range(rows), ((0, 1, keys),)) for head in range(heads)],
        row_order=torch.full((len(q),), keys, dtype=torch.int32, device=q.device),
        key_begin=torch.zeros(1, k.shape[1], dtype=torch.int64, device=q.device),
    )
    taken = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        prefill_attention(q, k, v, index, scale=q.shape[2] ** -0.5)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        taken.append(time.perf_counter() - started)
    # the first one warms up
    return median(taken[1:]) / heads
