"""Decode attention on a CPU over quantized pages whose newest rows are floats: compiled C, or torch.

Knows nothing about page tables: a KV head's slots come as runs, as in `cpu.py`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kernels import native
from mmserve.kernels.paged_decode.cpu import FAILURES, SOURCE, fits
from mmserve.kernels.paged_decode.naive_pages import PageScales, read_pages

_KINDS = {torch.int8: 0, torch.uint8: 1, torch.float8_e4m3fn: 2}


def paged_decode_quantized(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scales: PageScales,
    k_newest: Tensor,
    v_newest: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    *,
    scale: float,
) -> Tensor:
    """As `cpu.paged_decode`, over two arrays of slots: those of quantized pages, then the newest ones.

    k_pages and v_pages [pages, page_size, d] (int4: d / 2 bytes) are as in `PageScales`, keys scaled by
    channel, scales fp16. k_newest and v_newest [slots, d] are of q's dtype; the first of them is slot number
    pages * page_size of the runs.
    """
    out = torch.empty_like(q)
    parts = (scales.k_scale, scales.k_zero, scales.v_scale, scales.v_zero)
    tensors = (q, k_newest, v_newest, run_first, run_length, run_begin, out, k_pages, v_pages)
    assert all(tensor.is_contiguous() for tensor in (*tensors, *parts) if tensor is not None), "contiguous"
    assert q.dtype == k_newest.dtype == v_newest.dtype, f"types differ: {q.dtype}, {k_newest.dtype}"
    assert scales.key_axis == "channel", "keys are scaled by channel"
    assert run_first.dtype == run_begin.dtype == torch.int64, "run_first and run_begin are int64"
    assert run_length.dtype == torch.int32, "run_length is int32"
    if len(q) == 0:
        return out
    batch, q_heads, d = q.shape
    kv_heads = (len(run_begin) - 1) // batch
    assert k_newest.shape == v_newest.shape == (len(k_newest), d), "newest slots are [slots, d]"
    kernel = _kernel()
    if kernel is None or not fits(q, kv_heads) or scales.k_scale.dtype is not torch.float16:
        runs = run_first, run_length, run_begin
        return _torch_decode(q, k_pages, v_pages, scales, k_newest, v_newest, *runs, scale, out)
    pages, page_size = k_pages.shape[:2]
    pointers = (None if part is None else part.data_ptr() for part in (*tensors, *parts))
    sizes = (batch, q_heads, kv_heads, d, len(k_newest), pages * page_size, page_size)
    is_bf16, kind = q.dtype is torch.bfloat16, _KINDS[k_pages.dtype]
    failure = kernel(*pointers, *sizes, scale, is_bf16, torch.get_num_threads(), kind)
    if failure:
        raise RuntimeError(f"paged_decode: {FAILURES[failure]}")
    return out


@cache
def _kernel() -> native.Function | None:
    return native.function(SOURCE, "paged_decode_quantized", pointers=13, sizes=7, floats=1, flags=3)


def _torch_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scales: PageScales,
    k_newest: Tensor,
    v_newest: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """One head at a time, whose pages are expanded first."""
    heads, page_size = len(run_begin) - 1, k_pages.shape[1]
    grouped, results = q.view(heads, -1, q.shape[-1]), out.view(heads, -1, q.shape[-1])
    newest = len(k_pages) * page_size
    begins, firsts, lengths = run_begin.tolist(), run_first.tolist(), run_length.tolist()
    for head in range(heads):
        runs = slice(begins[head], begins[head + 1])
        parts = [torch.arange(a, a + n) for a, n in zip(firsts[runs], lengths[runs], strict=True)]
        slots = torch.cat(parts)
        stored, floats = slots[slots < newest], slots[slots >= newest] - newest
        pages, where = torch.unique(stored // page_size, return_inverse=True)
        read = read_pages(k_pages, v_pages, pages, scales)
        keys, values = (
            torch.cat([rows[where * page_size + stored % page_size].to(q.dtype), new[floats]])
            for rows, new in zip(read, (k_newest, v_newest), strict=True)
        )
        results[head] = functional.scaled_dot_product_attention(
            grouped[head][None, None], keys[None, None], values[None, None], scale=scale
        )
    return out
