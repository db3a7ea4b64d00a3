"""Decode attention on a CPU, straight from the pages: compiled C, or torch where there is no compiler.

Knows nothing about page tables: a KV head's slots come as runs, which may be as short as one slot.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kernels import native

NATIVE_TYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_name("cpu.c")
MAX_GROUP = 16
MAX_HEAD_DIM = 256
FAILURES = {1: "no memory for partial results", 2: "a run leaves the arrays, or a head has no slot"}


def fits(q: Tensor, kv_heads: int) -> bool:
    """Whether the compiled kernels take these queries [B, Hq, d]."""
    q_heads, d = q.shape[1:]
    return q.dtype in NATIVE_TYPES and d % 8 == 0 and d <= MAX_HEAD_DIM and q_heads <= MAX_GROUP * kv_heads


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Outputs [B, Hq, d] of one query row per sequence over all slots of its KV heads.

    q [B, Hq, d]; k, v [slots, d] of q's dtype; query head h reads KV head h // (Hq / Hkv). The slots of
    head h of sequence b are the runs `run_begin[b * Hkv + h] : run_begin[b * Hkv + h + 1]`: run_first
    int64 [runs] is a run's first slot, run_length int32 [runs] how many follow each other; run_begin is
    int64 [B * Hkv + 1]. Every head has at least one slot. All tensors are contiguous and on the CPU.
    The compiled result depends on neither the number of threads, nor the other sequences, nor how the
    slots are cut into runs.
    """
    out = torch.empty_like(q) if out is None else out
    tensors = (q, k, v, run_first, run_length, run_begin, out)
    assert all(tensor.is_contiguous() for tensor in tensors), "tensors are contiguous"
    assert q.dtype == k.dtype == v.dtype == out.dtype, f"types differ: {q.dtype}, {k.dtype}, {v.dtype}"
    assert run_first.dtype == run_begin.dtype == torch.int64, "run_first and run_begin are int64"
    assert run_length.dtype == torch.int32, "run_length is int32"
    assert k.shape == v.shape, "k and v are alike"
    assert out.shape == q.shape, "out is like q"
    if len(q) == 0:
        return out
    batch, q_heads, d = q.shape
    kv_heads = (len(run_begin) - 1) // batch
    kernel = _kernel()
    if kernel is None or not fits(q, kv_heads):
        return _torch_decode(q, k, v, run_first, run_length, run_begin, scale, out)
    pointers = (tensor.data_ptr() for tensor in tensors)
    sizes = (batch, q_heads, kv_heads, d, len(k))
    failure = kernel(*pointers, *sizes, scale, q.dtype == torch.bfloat16, torch.get_num_threads())
    if failure:
        raise RuntimeError(f"paged_decode: {FAILURES[failure]}")
    return out


@cache
def _kernel() -> native.Function | None:
    return native.function(SOURCE, "paged_decode", pointers=7, sizes=5, floats=1, flags=2)


def _torch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """One head at a time; a head of one run is read where it lies."""
    heads = len(run_begin) - 1
    grouped, results = q.view(heads, -1, q.shape[-1]), out.view(heads, -1, q.shape[-1])
    begins, firsts, lengths = run_begin.tolist(), run_first.tolist(), run_length.tolist()
    for head in range(heads):
        runs = slice(begins[head], begins[head + 1])
        spans = [slice(a, a + n) for a, n in zip(firsts[runs], lengths[runs], strict=True)]
        keys, values = (
            pages[spans[0]] if len(spans) == 1 else torch.cat([pages[span] for span in spans])
            for pages in (k, v)
        )
        # one head whose rows are the queries of the group
        results[head] = functional.scaled_dot_product_attention(
            grouped[head][None, None], keys[None, None], values[None, None], scale=scale
        )
    return out
