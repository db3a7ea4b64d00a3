"""Chunks of random queries and keys for the tests of patterns, and what an index lets each row see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView, PatternMemory, Skipping
from mmserve.kernels.prefill_attention import AttentionIndex
from tests.attention.views import causal, checked, index_of


def chunk(
    rows: int | Sequence[int],
    slots: int,
    *,
    kv_heads: int = 2,
    group: int = 2,
    d: int = 16,
    spread: float = 2.0,
    seed: int = 0,
    layer: int = 3,
    tile_rows: int = 128,
    dtype: torch.dtype = torch.float32,
    memory: PatternMemory | None = None,
) -> ChunkView:
    """Rows are the last slots, or those that are named. A wider spread makes attention sharper."""
    named = np.arange(slots - rows, slots) if isinstance(rows, int) else np.array(rows)
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(len(named), kv_heads * group, d, generator=rng) * spread
    k, v = (torch.randn(slots, kv_heads, d, generator=rng) for _ in range(2))
    nothing = np.full(slots, -1, np.int32)
    return ChunkView(
        layer=layer,
        layers=8,
        queries=q.to(dtype),
        keys=k.to(dtype),
        values=v.to(dtype),
        rows=named.astype(np.int32),
        is_visual=np.zeros(slots, np.bool_),
        item=nothing,
        frame=nothing,
        tile_rows=tile_rows,
        memory=memory,
    )


def seen_by(found: AttentionIndex | Skipping | None, view: ChunkView) -> Tensor:
    """Which rows see which slots, bool [Hq, rows, slots]; raises where an index breaks a guarantee."""
    index = index_of(found)
    assert index is not None
    return checked(index, view)


def scores_of(view: ChunkView, head: int) -> Tensor:
    """Scaled products of one query head, fp64 [rows, slots], without a mask."""
    kv_head = head // (view.queries.shape[1] // view.keys.shape[1])
    return view.queries[:, head].double() @ view.keys[:, kv_head].double().T * view.scale


def weights_of(view: ChunkView, head: int) -> Tensor:
    """Dense attention of one query head, fp64 [rows, slots]."""
    return torch.softmax(scores_of(view, head).masked_fill(~causal(view), -torch.inf), -1)


def blocks_of(count: int, size: int) -> list[slice]:
    """The places of blocks of rows or keys."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
