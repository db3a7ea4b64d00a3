"""Attention of an `AttentionIndex` on a CPU in compiled C: bf16 tiles that do only the work they list.

Knows nothing about patterns.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmserve.kernels import native
from mmserve.kernels.merge_lse.naive import Partial
from mmserve.kernels.prefill_attention.index import AttentionIndex

MAX_HEAD_DIM = 256
_FAILURES = {1: "no memory for its scratch", 2: "a key of the index is not in storage"}


def is_available(q: Tensor, k: Tensor) -> bool:
    """Whether `tile_attention` runs these here: bf16, a compiler, and a CPU with AVX512-BF16."""
    if not (q.dtype is k.dtype is torch.bfloat16 and q.device.type == k.device.type == "cpu"):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_HEAD_DIM and _kernel() is not None


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    *,
    scale: float,
    tables: Tensor | None = None,
    skip_threshold: float = 0.0,
) -> Partial:
    """As `prefill_attention.prefill_attention`, for bf16 on a CPU; rows of no tile are undefined.

    The channels of q, k and v are contiguous, pages wholly. Scores, softmax and sums are fp32, the weights
    bf16. A row's result does not depend on threads, bit for bit; where keys are listed in rising order, not
    on the other rows of its tile either: else those decide which keys are summed together, as they do about
    what a threshold leaves out.
    """
    kernel = _kernel()
    assert kernel is not None, "asked for where it does not run"
    assert is_available(q, k), "asked for where it does not run"
    assert q.stride(2) == k.stride(-1) == v.stride(-1) == 1, "channels are contiguous"
    assert k.stride() == v.stride(), "v lies as k does"
    rows, q_heads, d = q.shape
    out, lse = torch.empty(rows, q_heads, d, dtype=q.dtype), torch.empty(rows, q_heads)
    lists = (index.tiles, index.rows, index.runs, index.blocks, index.columns, index.row_order)
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in lists), "lists are int32"
    begin = index.key_begin.contiguous()
    mapped = (index.key_order, index.key_slot)
    assert all(each is None or each.dtype == torch.int32 for each in mapped), "orders and slots are int32"
    places = min((len(each) for each in mapped if each is not None), default=0)
    page_size = max_pages = 0
    if tables is not None:
        assert k.is_contiguous(), "pages are contiguous"
        tables = tables.to(torch.int32).contiguous()
        page_size, max_pages = k.shape[1], tables.shape[2]
    pointers = [_pointer(each) for each in (q, k, v, out, lse, *lists, begin, *mapped, tables)]
    sizes = (len(index.tiles), q_heads, begin.shape[1], d, index.block_size, places, len(k))
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    factors = (scale * math.log2(math.e), math.log2(skip_threshold) if skip_threshold else 0.0)
    failure = kernel(*pointers, *sizes, max_pages, page_size, *strides, *factors, torch.get_num_threads())
    if failure:
        raise RuntimeError(f"tile_attention: {_FAILURES[failure & 2 or failure]}")
    return Partial(out, lse)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _kernel() -> native.Function | None:
    source = Path(__file__).with_name("cpu_tiles.c")
    return native.function(source, "tile_attention", pointers=15, sizes=13, floats=2, flags=1)
