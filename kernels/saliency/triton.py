"""Column sums of an attention map that is never in memory. Knows nothing about towers or grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """How a map is cut: tiles of rows times tokens."""

    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _load_rows(ptr, row, last, head, stride, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head; 0 past the end of a picture."""
    channel = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + head.to(tl.int64) * stride_h + channel[None, :]
    return tl.load(at, mask=(row < last)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def row_lse_fwd_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,
    begins_ptr,  # int32 [pictures + 1]
    lse_ptr,  # fp32 [H, N], in units of log 2
    scale_log2,
    tokens,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    begin = tl.load(begins_ptr + tl.program_id(2))
    last = tl.load(begins_ptr + tl.program_id(2) + 1)
    row = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = _load_rows(q_ptr, row, last, head, stride_q, stride_qh, D, BLOCK_D)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, last, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k = _load_rows(k_ptr, key, last, head, stride_k, stride_kh, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        s = tl.where((key < last)[None, :], s, float("-inf"))
        # every block has a token, so m is finite
        m_new = tl.maximum(m, tl.max(s, 1))
        total = total * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    lse = m + tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(lse_ptr + head.to(tl.int64) * tokens + row, lse, mask=row < last)


@triton.jit
def column_sums_fwd_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,
    begins_ptr,  # int32 [pictures + 1]
    lse_ptr,  # fp32 [H, N], in units of log 2
    sums_ptr,  # fp32 [H, N]: mean over the rows
    scale_log2,
    tokens,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    begin = tl.load(begins_ptr + tl.program_id(2))
    last = tl.load(begins_ptr + tl.program_id(2) + 1)
    key = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = _load_rows(k_ptr, key, last, head, stride_k, stride_kh, D, BLOCK_D)
    sums = tl.zeros([BLOCK], tl.float32)
    lse_at = lse_ptr + head.to(tl.int64) * tokens
    for start in range(begin, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        q = _load_rows(q_ptr, row, last, head, stride_q, stride_qh, D, BLOCK_D)
        lse = tl.load(lse_at + row, mask=row < last, other=float("inf"))
        s = tl.dot(k, q.T, input_precision=PRECISION) * scale_log2
        sums += tl.sum(tl.exp2(s - lse[None, :]), 1)
    tl.store(sums_ptr + head.to(tl.int64) * tokens + key, sums / tl.maximum(last - begin, 1), mask=key < last)


def constants(dtype: torch.dtype, d: int, config: Config) -> dict[str, object]:
    """What the kernels are compiled for."""
    return {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK": config.block,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def saliency(
    q: Tensor,
    k: Tensor,
    begins: Tensor,
    *,
    scale: float,
    max_tokens: int,
    config: Config | None = None,
) -> Tensor:
    """As `saliency.saliency`; q and k may be parts of a fused projection."""
    config = config or Config()
    tokens, heads, d = q.shape
    assert q.shape == k.shape, "q and k are alike"
    assert q.stride(2) == k.stride(2) == 1, "the channels of a row lie side by side"
    assert d <= 256, f"Expected up to 256 channels, but got {d}"
    assert begins.dtype == torch.int32, "begins are int32"
    assert begins.is_contiguous(), "begins are contiguous"
    lse, sums = (torch.empty(heads, tokens, device=q.device, dtype=torch.float32) for _ in range(2))
    pictures = len(begins) - 1
    if tokens == 0 or pictures == 0:
        return sums.new_zeros(tokens)
    grid = (triton.cdiv(max_tokens, config.block), heads, pictures)
    call = (scale * LOG2E, tokens, *q.stride()[:2], *k.stride()[:2])
    settings = constants(q.dtype, d, config) | {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    row_lse_fwd_kernel[grid](q, k, begins, lse, *call, **settings)
    column_sums_fwd_kernel[grid](q, k, begins, lse, sums, *call, **settings)
    return sums.mean(0)
