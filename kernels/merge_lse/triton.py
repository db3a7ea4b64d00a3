"""The merge on a GPU: one pass over the parts. Knows nothing about where they come from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.merge_lse.naive import Partial

BLOCK_ROWS = 4
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_lse_fwd_kernel(
    outs_ptr,  # [parts, rows, D]
    lses_ptr,  # [parts, rows]
    out_ptr,  # [rows, D]
    lse_ptr,  # [rows]
    parts,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    inside = row < rows
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for part in range(parts):
        at = row + part * rows
        lse = tl.load(lses_ptr + at, mask=inside, other=float("-inf")) * LOG2E
        # a part that saw nothing may hold anything
        used = (lse > float("-inf"))[:, None] & (channel < D)[None, :]
        out = tl.load(outs_ptr + at[:, None] * D + channel[None, :], mask=used, other=0.0)
        m_new = tl.maximum(m, lse)
        m_safe = tl.where(m_new > float("-inf"), m_new, 0.0)
        alpha, weight = tl.exp2(m - m_safe), tl.exp2(lse - m_safe)
        acc = acc * alpha[:, None] + out.to(tl.float32) * weight[:, None]
        total = total * alpha + weight
        m = m_new
    seen = total > 0
    result = acc / tl.where(seen, total, 1.0)[:, None]
    tl.store(
        out_ptr + row[:, None] * D + channel[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (channel < D)[None, :],
    )
    # log2 of 1 where the row saw nothing: m is -inf there
    tl.store(lse_ptr + row, (m + tl.log2(tl.where(seen, total, 1.0))) * LN2, mask=inside)


def constants(d: int) -> dict[str, object]:
    """What the kernel is compiled for."""
    return {"D": d, "BLOCK_D": triton.next_power_of_2(d), "BLOCK_ROWS": BLOCK_ROWS}


def merge_lse(outs: Tensor, lses: Tensor, *, out: Tensor | None = None) -> Partial:
    """As `naive.merge_lse`; the output has the dtype of `out`, by default that of `outs`.

    outs [parts, ..., d] and lses fp32 [parts, ...] are contiguous.
    """
    assert outs.is_contiguous(), "outs is contiguous"
    assert lses.is_contiguous(), "lses is contiguous"
    assert outs.shape[:-1] == lses.shape, f"{tuple(outs.shape)} and {tuple(lses.shape)} do not fit"
    assert lses.dtype == torch.float32, "LSEs are fp32"
    d = outs.shape[-1]
    out = torch.empty_like(outs[0]) if out is None else out
    assert out.shape == outs.shape[1:], f"Expected out like one part, but got {tuple(out.shape)}"
    assert out.is_contiguous(), "out is contiguous"
    lse = torch.empty_like(lses[0])
    if lse.numel():
        merge_lse_fwd_kernel[(triton.cdiv(lse.numel(), BLOCK_ROWS),)](
            outs, lses, out, lse, len(outs), lse.numel(), **constants(d), num_warps=4
        )
    return Partial(out, lse)
