"""Attention of many rows per sequence, dense or sparse: what each row sees is an `AttentionIndex`."""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.merge_lse.naive import Partial
from mmserve.kernels.prefill_attention import cpu_tiles, naive
from mmserve.kernels.prefill_attention.index import AttentionIndex, dense_index

__all__ = ["AttentionIndex", "Partial", "dense_index", "prefill_attention"]


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    *,
    scale: float,
    tables: Tensor | None = None,
    skip_threshold: float = 0.0,
) -> Partial:
    """Outputs like q and LSE fp32 [rows, Hq] of packed rows q [rows, Hq, d]; rows of no tile are undefined.

    k, v: [keys, Hkv, d], the keys of all sequences one after another (`index.key_begin`), or, with tables
    int32 [sequences, Hkv, max_pages], pages [pages, page_size, d]. Query head h reads KV head
    h // (Hq / Hkv).
    A skip_threshold above 0 leaves out blocks in which no weight exceeds that share of its row's largest
    weight so far; the oracle leaves out nothing.
    """
    if backend_for(q.device) == "naive":
        if cpu_tiles.is_available(q, k):
            return cpu_tiles.tile_attention(
                q, k, v, index, scale=scale, tables=tables, skip_threshold=skip_threshold
            )
        out, lse = naive.prefill_attention(q, k, v, index, scale=scale, tables=tables)
        return Partial(out.to(q.dtype), lse)
    # triton is imported only where it runs
    from mmserve.kernels.prefill_attention import triton

    return triton.prefill_attention(q, k, v, index, scale=scale, tables=tables, skip_threshold=skip_threshold)
