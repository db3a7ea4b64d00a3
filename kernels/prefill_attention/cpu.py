"""Attention of many bf16 rows on a CPU, straight from the pages, in compiled C.

Knows nothing about page tables: a KV head's slots come as runs.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmserve.kernels import native

MAX_HEAD_DIM = 256
_FAILURES = {1: "no memory for its scratch", 2: "a run leaves the arrays, or a head has too few keys"}


def is_available(q: Tensor, k: Tensor) -> bool:
    """Whether `prefill_attention` runs these here: bf16, a compiler, and a CPU with AVX512-BF16."""
    if not (q.dtype is k.dtype is torch.bfloat16 and q.device.type == k.device.type == "cpu"):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_HEAD_DIM and _kernel() is not None


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    *,
    scale: float,
    is_causal: bool,
    slot_step: int = 1,
) -> Tensor:
    """Outputs [B, n, Hq, d] of the last n positions of B sequences, or of rows that see every key.

    q [B, n, Hq, d], its last two axes contiguous; k and v are viewed as [slots, d], contiguous; query head
    h reads KV head h // (Hq / Hkv). The slots of head h of sequence b are the runs `run_begin[b * Hkv + h]`
    to `run_begin[b * Hkv + h + 1]`: key j of a run is slot run_first + j * slot_step, run_length of them
    (int64 and int32 [runs]; run_begin int64 [B * Hkv + 1]). With `is_causal` row i sees all but the last
    n - 1 - i slots of its sequence, which has n at least. Scores, softmax and sums are fp32, the weights
    bf16. The result does not depend on the number of threads or on how slots are cut into runs.
    """
    kernel = _kernel()
    assert kernel is not None, "asked for where it does not run"
    assert is_available(q, k), "asked for where it does not run"
    batch, rows, q_heads, d = q.shape
    assert q.stride()[2:] == (d, 1), "the last two axes of q are contiguous"
    assert k.is_contiguous(), "k is contiguous"
    assert v.is_contiguous(), "v is contiguous"
    assert v.shape == k.shape, "v is like k"
    tensors = (q, k, v, run_first.contiguous(), run_length.contiguous(), run_begin.contiguous())
    assert tensors[3].dtype == tensors[5].dtype == torch.int64, "run_first and run_begin are int64"
    assert tensors[4].dtype == torch.int32, "run_length is int32"
    out = torch.empty(q.shape, dtype=q.dtype)
    if q.numel() == 0:
        return out
    kv_heads = (len(run_begin) - 1) // batch
    sizes = (batch, rows, q_heads, kv_heads, d, k.numel() // d, q.stride(0), q.stride(1), slot_step)
    pointers = [tensor.data_ptr() for tensor in (*tensors, out)]
    threads = torch.get_num_threads()
    failure = kernel(*pointers, *sizes, scale * math.log2(math.e), is_causal, threads)
    if failure:
        raise RuntimeError(f"prefill_attention: {_FAILURES[failure]}")
    return out


@cache
def _kernel() -> native.Function | None:
    source = Path(__file__).with_name("cpu.c")
    return native.function(source, "prefill_attention", pointers=7, sizes=9, floats=1, flags=2)
