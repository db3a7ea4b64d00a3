"""Oracle: fp32 torch on any device, one tile at a time. Knows nothing about blocks, threads or memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mmserve.kernels.merge_lse.naive import Partial
from mmserve.kernels.prefill_attention.index import (
    AttentionIndex,
    key_orders,
    key_slots,
    tile_keys,
    tile_rows_of,
)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    *,
    scale: float,
    tables: Tensor | None = None,
) -> Partial:
    """As `prefill_attention.prefill_attention` without a skip threshold; the output is fp32.

    Rows of no tile are 0 with LSE -inf.
    """
    group = q.shape[1] // index.key_begin.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for tile in index.tiles.tolist():
        sequence, head = tile[:2]
        rows, keys = tile_rows_of(index, tile), tile_keys(index, tile)
        visible = key_orders(index, tile, keys, group) <= index.row_order[rows][:, None]
        slots = key_slots(index, tile, keys, group)
        tile_k, tile_v = (_read(pages, index, tables, sequence, head // group, slots) for pages in (k, v))
        scores = (q[rows, head].float() @ tile_k.T * scale).masked_fill(~visible, -torch.inf)
        lse[rows, head] = torch.logsumexp(scores, -1)
        # a row that sees nothing has weights of nan
        out[rows, head] = torch.softmax(scores, -1).nan_to_num(0.0) @ tile_v
    return Partial(out, lse)


def _read(
    kv: Tensor, index: AttentionIndex, tables: Tensor | None, sequence: int, kv_head: int, slots: Tensor
) -> Tensor:
    """K or V [n, d] of the slots of one KV head, fp32."""
    if tables is None:
        return kv[index.key_begin[sequence, kv_head] + slots, kv_head].float()
    page_size = kv.shape[1]
    return kv[tables[sequence, kv_head, slots // page_size].long(), slots % page_size].float()
