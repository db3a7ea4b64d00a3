"""Norms, rotations and the way into the pages on a GPU. Knows nothing about who owns a slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
BLOCK_HEADS = 8
BLOCK_SLOTS = 16


@triton.jit
def _cos_sin(angle):
    """Of fp32 angles of any size up to 2^31, to 1e-7 of their sine.

    The library's functions keep a table on the stack for large angles; fp64 is needed for the reduction
    to an eighth of a turn only.
    """
    quarters = angle.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    y = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    z = y * y
    near_sin = y + y * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    near_cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    quadrant = whole.to(tl.int64).to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    cos = tl.where(swapped, near_sin, near_cos)
    sin = tl.where(swapped, near_cos, near_sin)
    cos = tl.where(((quadrant + 1) & 2) == 2, -cos, cos)
    return cos, tl.where((quadrant & 2) == 2, -sin, sin)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,  # [N, D]
    residual_ptr,  # [N, D] or None
    weight_ptr,  # [D]
    out_ptr,  # [N, D]
    total_ptr,  # [N, D], or None without a residual
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D
    channel = tl.arange(0, BLOCK_D)
    inside = channel < D
    x = tl.load(x_ptr + row + channel, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row + channel, mask=inside, other=0.0).to(tl.float32)
        # what is normed is what the next residual is, rounded
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + channel, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(out_ptr + row + channel, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _head_scales(first, second, q_weight_ptr, k_weight_ptr, is_q, eps, pair, known, PAIRS: tl.constexpr):
    """What both halves of queries and keys are multiplied with, where they are normed first."""
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * PAIRS)
    inverse = tl.rsqrt(mean + eps)[:, None]
    q_first = tl.load(q_weight_ptr + pair, mask=known, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight_ptr + pair, mask=known, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight_ptr + PAIRS + pair, mask=known, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight_ptr + PAIRS + pair, mask=known, other=0.0).to(tl.float32)
    scale_first = inverse * tl.where(is_q[:, None], q_first[None, :], k_first[None, :])
    return scale_first, inverse * tl.where(is_q[:, None], q_second[None, :], k_second[None, :])


@triton.jit
def _store_halves(ptr, row, first, second, inside, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows of 2 * PAIRS channels."""
    at = ptr + row[:, None] * (2 * PAIRS) + tl.arange(0, BLOCK_P)[None, :]
    tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + PAIRS, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_append_fwd_kernel(
    qkv_ptr,  # [N, Q_HEADS + 2 * KV_HEADS, 2 * PAIRS]
    positions_ptr,  # int32 [N, AXES]
    frequencies_ptr,  # fp32 [PAIRS]
    axis_of_pair_ptr,  # int32 [PAIRS], or None with one axis
    q_weight_ptr,  # [2 * PAIRS] or None
    k_weight_ptr,
    slots_ptr,  # int64 [KV_HEADS, N]
    q_ptr,  # [N, Q_HEADS, 2 * PAIRS]
    k_pages_ptr,  # [slots, 2 * PAIRS]
    v_pages_ptr,
    tokens,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    AXES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_P)
    known = pair < PAIRS
    is_q, is_v = head < Q_HEADS, head >= Q_HEADS + KV_HEADS
    inside = (head < HEADS)[:, None] & known[None, :]
    at = qkv_ptr + (token * HEADS + head)[:, None] * (2 * PAIRS) + pair[None, :]
    stored_first = tl.load(at, mask=inside, other=0.0)
    stored_second = tl.load(at + PAIRS, mask=inside, other=0.0)
    first, second = stored_first.to(tl.float32), stored_second.to(tl.float32)
    if q_weight_ptr is not None:
        scale_first, scale_second = _head_scales(
            first, second, q_weight_ptr, k_weight_ptr, is_q, eps, pair, known, PAIRS
        )
        first *= scale_first
        second *= scale_second
    axis = 0
    if axis_of_pair_ptr is not None:
        axis = tl.load(axis_of_pair_ptr + pair, mask=known, other=0)
    position = tl.load(positions_ptr + token * AXES + axis + pair * 0)
    frequency = tl.load(frequencies_ptr + pair, mask=known, other=0.0)
    cos, sin = _cos_sin(position.to(tl.float32) * frequency)
    turned_first = first * cos[None, :] - second * sin[None, :]
    turned_second = second * cos[None, :] + first * sin[None, :]
    q_row, q_inside = token * Q_HEADS + head, inside & is_q[:, None]
    _store_halves(q_ptr, q_row, turned_first, turned_second, q_inside, PAIRS, BLOCK_P)
    kv_head = head - Q_HEADS - tl.where(is_v, KV_HEADS, 0)
    is_kv = (head >= Q_HEADS) & (head < HEADS)
    slot = tl.load(slots_ptr + kv_head.to(tl.int64) * tokens + token, mask=is_kv, other=-1)
    written = inside & (slot >= 0)[:, None]
    k_inside, v_inside = written & ~is_v[:, None], written & is_v[:, None]
    _store_halves(k_pages_ptr, slot, turned_first, turned_second, k_inside, PAIRS, BLOCK_P)
    _store_halves(v_pages_ptr, slot, stored_first, stored_second, v_inside, PAIRS, BLOCK_P)


@triton.jit
def rerotate_fwd_kernel(
    k_pages_ptr,  # [slots, 2 * PAIRS]
    v_pages_ptr,
    source_ptr,  # int64 [count]
    destination_ptr,  # int64 [count]
    delta_ptr,  # int32 [count]
    frequencies_ptr,  # fp32 [PAIRS]
    count,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    D: tl.constexpr = 2 * PAIRS
    move = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    pair = tl.arange(0, BLOCK_P)
    real = move < count
    inside = real[:, None] & (pair < PAIRS)[None, :]
    source = tl.load(source_ptr + move, mask=real, other=0)[:, None] * D + pair[None, :]
    destination = tl.load(destination_ptr + move, mask=real, other=0)[:, None] * D + pair[None, :]
    delta = tl.load(delta_ptr + move, mask=real, other=0).to(tl.float32)
    frequency = tl.load(frequencies_ptr + pair, mask=pair < PAIRS, other=0.0)
    cos, sin = _cos_sin(delta[:, None] * frequency[None, :])
    first = tl.load(k_pages_ptr + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(k_pages_ptr + source + PAIRS, mask=inside, other=0.0).to(tl.float32)
    dtype = k_pages_ptr.dtype.element_ty
    tl.store(k_pages_ptr + destination, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(k_pages_ptr + destination + PAIRS, (second * cos + first * sin).to(dtype), mask=inside)
    for half in tl.static_range(2):
        v = tl.load(v_pages_ptr + source + half * PAIRS, mask=inside, other=0.0)
        tl.store(v_pages_ptr + destination + half * PAIRS, v, mask=inside)


def norm_warps(width: int) -> int:
    """Enough threads that each holds 16 numbers of a row."""
    return max(1, min(16, int(triton.next_power_of_2(width)) // 512))


def norm_constants(width: int) -> dict[str, object]:
    """What `rms_norm` is compiled for."""
    return {"D": width, "BLOCK_D": triton.next_power_of_2(width)}


def rope_constants(q_heads: int, kv_heads: int, d: int, axes: int) -> dict[str, object]:
    """What `rope_append` is compiled for."""
    return {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "AXES": axes,
        "PAIRS": d // 2,
        "BLOCK_P": triton.next_power_of_2(d // 2),
        "BLOCK_HEADS": BLOCK_HEADS,
    }


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm_rope.rms_norm`; all tensors are contiguous."""
    width = x.shape[-1]
    assert x.is_contiguous(), "x is contiguous"
    assert weight.shape == (width,), "one weight per channel"
    assert width <= MAX_WIDTH, "rows fit one program"
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape), "residual is like x"
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        rms_norm_fwd_kernel[(x.numel() // width,)](
            x, residual, weight, out, None if residual is None else total, eps,
            **norm_constants(width), num_warps=norm_warps(width),
        )  # fmt: skip
    return out, total


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    axis_of_pair: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `norm_rope.rope_append`; all tensors are contiguous."""
    tokens, heads, d = qkv.shape
    kv_heads = len(slots)
    axes = 1 if positions.ndim == 1 else positions.shape[1]
    q_heads = heads - 2 * kv_heads
    assert all(t.is_contiguous() for t in (qkv, positions, slots, k_pages, v_pages)), "contiguous"
    assert slots.dtype == torch.int64, "slots are int64 [Hkv, N]"
    assert slots.shape == (kv_heads, tokens), "slots are int64 [Hkv, N]"
    assert frequencies.shape == (d // 2,), "one frequency per pair of channels"
    assert d % 2 == 0, f"Expected pairs of channels, but got {d}"
    assert d <= 256, f"Expected up to 256 channels, but got {d}"
    assert axes == 1 or axis_of_pair is not None, "several axes need axis_of_pair"
    assert (q_weight is None) == (k_weight is None), "queries and keys are normed together"
    assert k_pages.shape == v_pages.shape, "pages of K and V are alike"
    assert k_pages.dtype == v_pages.dtype, "pages of K and V are alike"
    assert k_pages.shape[-1] == d, f"Expected pages of {d} channels, but got {k_pages.shape[-1]}"
    q = torch.empty(tokens, q_heads, d, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        rope_append_fwd_kernel[(tokens, triton.cdiv(heads, BLOCK_HEADS))](
            qkv, positions, frequencies, axis_of_pair, q_weight, k_weight, slots, q, k_pages, v_pages,
            tokens, eps, **rope_constants(q_heads, kv_heads, d, axes), num_warps=4,
        )  # fmt: skip
    return q


def rerotate(
    k_pages: Tensor,
    v_pages: Tensor,
    source: Tensor,
    destination: Tensor,
    delta: Tensor,
    frequencies: Tensor,
) -> None:
    """As `norm_rope.rerotate`; all tensors are contiguous."""
    d = k_pages.shape[-1]
    assert k_pages.is_contiguous(), "pages are contiguous"
    assert v_pages.is_contiguous(), "pages are contiguous"
    assert k_pages.shape == v_pages.shape, "pages of K and V are alike"
    assert source.dtype == destination.dtype == torch.int64, "slots are int64"
    assert len(source) == len(destination) == len(delta), "one delta per move"
    assert len(frequencies) * 2 == d, "one frequency per pair of channels"
    if len(source):
        rerotate_fwd_kernel[(triton.cdiv(len(source), BLOCK_SLOTS),)](
            k_pages, v_pages, source, destination, delta, frequencies, len(source),
            PAIRS=d // 2, BLOCK_P=triton.next_power_of_2(d // 2), BLOCK_SLOTS=BLOCK_SLOTS, num_warps=4,
        )  # fmt: skip
