"""What several patterns measure and choose: probes of the last rows, scores of blocks, the largest of them.

Everything stays on the device of the queries. Knows nothing about lists or tiles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.assemble import row_order
from mmserve.errors import BadRequest
from mmserve.kernels import pattern_index
from mmserve.kernels.pattern_index import Probe
from mmserve.pruning.settings import setting

PROBE_ROWS = 64  # of one call of the kernel
SIZES = (16, 32, 64, 128, 256, 512)  # of blocks


def block_size(default: int, explanation: str) -> int:
    """A setting of a pattern: how many rows or keys are a block."""
    return setting(default, explanation, _check_size)


def _check_size(name: str, value: object) -> None:
    if value not in SIZES:
        raise BadRequest(f"Expected {name} to be one of {SIZES}, but got {value!r:.40}")


def last_rows(view: ChunkView, count: int) -> int:
    """How many rows, up to `count`, follow each other at the end of the chunk: slashes need that."""
    steps = np.diff(view.rows[-count:])
    gaps = np.flatnonzero(steps != 1)
    return len(steps) - int(gaps[-1]) if len(gaps) else len(steps) + 1


def probe(view: ChunkView, count: int) -> Probe:
    """Column and diagonal sums of the attention of the last `count` rows over the slots they see."""
    orders, scale = row_order(view), view.scale
    keys = view.keys.contiguous()
    seen = int(view.rows[-1]) + 1
    total = Probe(*(torch.zeros(view.queries.shape[1], seen, device=keys.device) for _ in range(2)))
    first = len(orders) - count
    for start in range(first, len(orders), PROBE_ROWS):
        stop = min(start + PROBE_ROWS, len(orders))
        axis = int(view.rows[stop - 1]) + 1
        part = pattern_index.probe(
            view.queries[start:stop].contiguous(), keys[:axis], orders[start:stop], None, scale=scale
        )
        total.vertical[:, :axis] += part.vertical
        total.slash[:, :axis] += part.slash
    return total


def block_scores(view: ChunkView, block: int, key_block: int) -> Tensor:
    """Scaled products of mean queries and mean keys of blocks: fp32 [Hq, row blocks, key blocks].

    -inf where no row of the block sees the first key.
    """
    return pattern_index.block_scores(
        view.queries.contiguous(),
        view.keys.contiguous(),
        row_order(view),
        None,
        block=block,
        key_block=key_block,
        scale=view.scale,
    )


def products(q: Tensor, k: Tensor) -> Tensor:
    """Products of rows q [N, Hq, d] and keys k [K, Hkv, d] in their type: [Hq, N, K]."""
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    scores: Tensor = grouped.flatten(1, 2) @ k.permute(1, 2, 0)
    return scores.view(q.shape[1], len(q), len(k))


def largest(values: Tensor, count: int | Tensor) -> Tensor:
    """Where the `count` largest of the last dimension are; `count` is one for all or one for each list."""
    if isinstance(count, int):
        best = values.topk(min(count, values.shape[-1]), sorted=False).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, True)
    order = values.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    return _unsorted(order, rank < count[..., None])


def fewest(values: Tensor, need: Tensor) -> Tensor:
    """Where the fewest of the last dimension are that sum up to `need`; none where it is not above 0."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    ordered = values.gather(-1, order)
    return _unsorted(order, ordered.cumsum(-1) - ordered < need[..., None])


def _unsorted(order: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros_like(kept).scatter_(-1, order, kept)
