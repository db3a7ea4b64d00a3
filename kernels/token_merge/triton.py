"""Token merging on a GPU: runs over time, and the merge. Knows nothing about budgets or models."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.token_merge.dpc_knn.triton import cluster_tokens, merge_weights

__all__ = ["cluster_tokens", "frame_cosine", "merge_weights", "run_lengths", "scatter_merge"]
BLOCK_LINKS = 16
BLOCK_POSITIONS = 128
BLOCK_CHANNELS = 128
BLOCK_CLUSTERS = 16
BLOCK_TOKENS = 32


@triton.jit
def frame_cosine_fwd_kernel(
    x_ptr,  # [N, D]
    clips_ptr,  # int32 [clips, 3]
    cosine_ptr,  # fp32 [N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LINKS: tl.constexpr,
):
    clip = clips_ptr + 3 * tl.program_id(1)
    first, frames, width = tl.load(clip), tl.load(clip + 1), tl.load(clip + 2)
    place = tl.program_id(0) * BLOCK_LINKS + tl.arange(0, BLOCK_LINKS)
    linked = place < (frames - 1) * width
    row = (first + place).to(tl.int64)
    dot = tl.zeros([BLOCK_LINKS], tl.float32)
    norm, next_norm = tl.zeros_like(dot), tl.zeros_like(dot)
    for start in range(0, D, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = linked[:, None] & (channel < D)[None, :]
        at = x_ptr + row[:, None] * D + channel[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(at + width.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(x * following, 1)
        norm += tl.sum(x * x, 1)
        next_norm += tl.sum(following * following, 1)
    # as torch: neither norm is taken as less than 1e-8
    lengths = tl.maximum(tl.sqrt(norm), 1e-8) * tl.maximum(tl.sqrt(next_norm), 1e-8)
    cosine = tl.where(linked, dot / lengths, float("-inf"))
    tl.store(cosine_ptr + row, cosine, mask=place < frames * width)


@triton.jit
def run_lengths_fwd_kernel(
    cosine_ptr,  # fp32 [N]
    clips_ptr,  # int32 [clips, 3]
    runs_ptr,  # int32 [N]
    tau,
    BLOCK_POSITIONS: tl.constexpr,
):
    clip = clips_ptr + 3 * tl.program_id(1)
    first, frames, width = tl.load(clip), tl.load(clip + 1), tl.load(clip + 2)
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = position < width
    run = tl.zeros([BLOCK_POSITIONS], tl.int32)
    for back in range(0, frames):
        row = first + (frames - 1 - back) * width + position
        # no link starts in the last frame
        cosine = tl.load(cosine_ptr + row, mask=inside & (back > 0), other=float("-inf"))
        run = tl.where(cosine > tau, run + 1, 0)
        tl.store(runs_ptr + row, run, mask=inside)


@triton.jit
def scatter_merge_fwd_kernel(
    x_ptr,  # [N, D]
    begins_ptr,  # int32 [G + 1]
    cluster_ptr,  # int32 [N]
    shares_ptr,  # fp32 [N]
    merged_ptr,  # [G, max_count, D]
    max_count,
    D: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(2)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    wanted = tl.program_id(1) * BLOCK_CLUSTERS + tl.arange(0, BLOCK_CLUSTERS)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_CLUSTERS, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        real = token < last
        cluster = tl.load(cluster_ptr + token, mask=real, other=-1)
        share = tl.load(shares_ptr + token, mask=real, other=0.0)
        at = x_ptr + token.to(tl.int64)[:, None] * D + channel[None, :]
        x = tl.load(at, mask=real[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
        mine = tl.where(cluster[None, :] == wanted[:, None], share[None, :], 0.0)
        acc = tl.dot(mine, x, acc, input_precision="ieee")
    at = merged_ptr + (group.to(tl.int64) * max_count + wanted)[:, None] * D + channel[None, :]
    written = (wanted < max_count)[:, None] & (channel < D)[None, :]
    tl.store(at, acc.to(merged_ptr.dtype.element_ty), mask=written)


def frame_cosine(x: Tensor, clips: Tensor, *, max_tokens: int) -> Tensor:
    """As `token_merge.frame_cosine`; x and clips are contiguous."""
    tokens, d = x.shape
    assert x.is_contiguous(), "x is contiguous"
    _check_clips(clips)
    cosine = torch.empty(tokens, device=x.device, dtype=torch.float32)
    if tokens:
        frame_cosine_fwd_kernel[(triton.cdiv(max_tokens, BLOCK_LINKS), len(clips))](
            x, clips, cosine, D=d, BLOCK_D=min(BLOCK_CHANNELS, triton.next_power_of_2(d)),
            BLOCK_LINKS=BLOCK_LINKS, num_warps=4,
        )  # fmt: skip
    return cosine


def run_lengths(cosine: Tensor, clips: Tensor, *, tau: float, max_width: int) -> Tensor:
    """As `token_merge.run_lengths`; cosine and clips are contiguous."""
    assert cosine.is_contiguous(), "cosines are contiguous"
    assert cosine.dtype == torch.float32, "cosines are fp32"
    _check_clips(clips)
    runs = torch.empty(cosine.shape, dtype=torch.int32, device=cosine.device)
    if cosine.numel():
        run_lengths_fwd_kernel[(triton.cdiv(max_width, BLOCK_POSITIONS), len(clips))](
            cosine, clips, runs, tau, BLOCK_POSITIONS=BLOCK_POSITIONS, num_warps=4
        )
    return runs


def scatter_merge(x: Tensor, begins: Tensor, cluster: Tensor, shares: Tensor, *, max_count: int) -> Tensor:
    """As `token_merge.scatter_merge`; all tensors are contiguous."""
    d = x.shape[1]
    assert x.is_contiguous(), "x is contiguous"
    assert cluster.shape == shares.shape == x.shape[:1], "one cluster and share a token"
    assert begins.dtype == cluster.dtype == torch.int32, "begins and clusters are int32"
    assert shares.dtype == torch.float32, "shares are fp32"
    merged = torch.empty(len(begins) - 1, max_count, d, dtype=x.dtype, device=x.device)
    block_d = max(16, min(BLOCK_CHANNELS, triton.next_power_of_2(d)))
    if merged.numel():
        grid = (triton.cdiv(d, block_d), triton.cdiv(max_count, BLOCK_CLUSTERS), len(merged))
        scatter_merge_fwd_kernel[grid](
            x, begins, cluster, shares, merged, max_count,
            D=d, BLOCK_CLUSTERS=BLOCK_CLUSTERS, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return merged


def _check_clips(clips: Tensor) -> None:
    assert clips.dtype == torch.int32, "clips are int32"
    assert clips.is_contiguous(), "clips are contiguous"
    assert clips.shape[1] == 3, "a clip is its first token, frames, tokens of a frame"
