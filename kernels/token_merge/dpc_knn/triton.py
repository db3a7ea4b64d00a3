"""DPC-KNN on a GPU, for many groups of tokens at once. Knows nothing about frames or what is merged.

Five launches, each of one program per few tokens; the table of distances of each group is in memory.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.token_merge.naive import Clusters

MAX_SIZE = 4096
BLOCK_PAIRS = 32
BLOCK_CHANNELS = 32


@triton.jit
def squared_distances_fwd_kernel(
    x_ptr,  # [N, D]
    begins_ptr,  # int32 [G + 1]
    squared_ptr,  # fp32 [G, max_size, max_size]
    max_size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # only the upper triangle is computed, so that both halves are equal to the last bit
    if tl.program_id(0) < tl.program_id(1):
        return
    group = tl.program_id(2).to(tl.int64)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_real, j_real = first + i < last, first + j < last
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    i_norm, j_norm = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        known = (channel < D)[None, :]
        # distances do not change under a shift, and small values lose less to cancellation
        origin_at = x_ptr + first.to(tl.int64) * D + channel
        origin = tl.load(origin_at, mask=(channel < D) & (first < last), other=0.0).to(tl.float32)[None, :]
        i_at = x_ptr + (first + i).to(tl.int64)[:, None] * D + channel[None, :]
        j_at = x_ptr + (first + j).to(tl.int64)[:, None] * D + channel[None, :]
        i_inside, j_inside = i_real[:, None] & known, j_real[:, None] & known
        x = tl.where(i_inside, tl.load(i_at, mask=i_inside, other=0.0).to(tl.float32) - origin, 0.0)
        y = tl.where(j_inside, tl.load(j_at, mask=j_inside, other=0.0).to(tl.float32) - origin, 0.0)
        products = tl.dot(x, y.T, products, input_precision="ieee")
        i_norm += tl.sum(x * x, 1)
        j_norm += tl.sum(y * y, 1)
    squared = tl.maximum((i_norm[:, None] + j_norm[None, :] - 2 * products) / D, 0.0)
    squared = tl.where(i[:, None] == j[None, :], 0.0, squared)
    upper = i_real[:, None] & j_real[None, :] & (i[:, None] <= j[None, :])
    table = squared_ptr + group * max_size * max_size
    tl.store(table + i[:, None] * max_size + j[None, :], squared, mask=upper)
    tl.store(table + j[None, :] * max_size + i[:, None], squared, mask=upper)


@triton.jit
def _distances(squared_ptr, group, token, other, max_size, size):
    """One row of a group's table; infinite past its end."""
    at = squared_ptr + (group * max_size + token) * max_size + other
    return tl.load(at, mask=other < size, other=float("inf"))


@triton.jit
def density_fwd_kernel(
    squared_ptr,
    begins_ptr,
    counts_ptr,  # int32 [G]
    density_ptr,  # fp32 [N]: minus the mean squared distance to the nearest tokens
    widest_ptr,  # fp32 [N]: the largest distance to any
    max_size,
    neighbours,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    token = tl.program_id(0)
    size = last - first
    if token >= size:
        return
    other = tl.arange(0, BLOCK)
    squared = _distances(squared_ptr, group, token, other, max_size, size)
    tl.store(widest_ptr + first + token, tl.max(tl.where(other < size, squared, 0.0), 0))
    nearest = tl.maximum(tl.minimum(tl.minimum(neighbours, tl.load(counts_ptr + group)), size), 1)
    total = 0.0
    for _ in range(nearest):
        least = tl.min(squared, 0)
        total += least
        # of equal ones the first leaves
        taken = tl.min(tl.where(squared == least, other, BLOCK), 0)
        squared = tl.where(other == taken, float("inf"), squared)
    tl.store(density_ptr + first + token, -total / nearest)


@triton.jit
def peaks_fwd_kernel(
    squared_ptr,
    begins_ptr,
    density_ptr,
    widest_ptr,
    score_ptr,  # fp32 [N]: log of density times distance to the nearest denser token
    max_size,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    token = tl.program_id(0)
    size = last - first
    if token >= size:
        return
    other = tl.arange(0, BLOCK)
    squared = _distances(squared_ptr, group, token, other, max_size, size)
    own = tl.load(density_ptr + first + token)
    densities = tl.load(density_ptr + first + other, mask=other < size, other=float("-inf"))
    denser = (densities > own) | ((densities == own) & (other < token))
    widest = tl.max(tl.load(widest_ptr + first + other, mask=other < size, other=0.0), 0)
    apart = tl.min(tl.where(denser, squared, float("inf")), 0)
    apart = tl.where(apart < float("inf"), apart, widest)
    # the logarithm of 0, written out
    score = tl.where(apart > 0, own + 0.5 * tl.log(tl.where(apart > 0, apart, 1.0)), float("-inf"))
    tl.store(score_ptr + first + token, score)


@triton.jit
def rank_fwd_kernel(score_ptr, begins_ptr, rank_ptr, BLOCK: tl.constexpr):
    group = tl.program_id(1)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    token = tl.program_id(0)
    size = last - first
    if token >= size:
        return
    other = tl.arange(0, BLOCK)
    own = tl.load(score_ptr + first + token)
    scores = tl.load(score_ptr + first + other, mask=other < size, other=float("-inf"))
    better = (scores > own) | ((scores == own) & (other < token))
    tl.store(rank_ptr + first + token, tl.sum((better & (other < size)).to(tl.int32), 0))


@triton.jit
def assign_fwd_kernel(
    squared_ptr,
    begins_ptr,
    counts_ptr,
    rank_ptr,  # int32 [N]
    cluster_ptr,  # int32 [N]
    max_size,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    token = tl.program_id(0)
    size = last - first
    if token >= size:
        return
    count = tl.load(counts_ptr + group)
    other = tl.arange(0, BLOCK)
    squared = _distances(squared_ptr, group, token, other, max_size, size)
    ranks = tl.load(rank_ptr + first + other, mask=other < size, other=BLOCK)
    squared = tl.where(ranks < count, squared, float("inf"))
    # of equally near centres the best
    nearest = (squared == tl.min(squared, 0)) & (ranks < count)
    cluster = tl.min(tl.where(nearest, ranks, BLOCK), 0)
    own = tl.load(rank_ptr + first + token)
    tl.store(cluster_ptr + first + token, tl.where(own < count, own, cluster))


@triton.jit
def merge_weights_fwd_kernel(
    rank_ptr,
    cluster_ptr,
    begins_ptr,
    weights_ptr,  # fp32 [N]
    shares_ptr,  # fp32 [N]
    beta,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1)
    first, last = tl.load(begins_ptr + group), tl.load(begins_ptr + group + 1)
    token = tl.program_id(0)
    size = last - first
    if token >= size:
        return
    other = tl.arange(0, BLOCK)
    inside = other < size
    rank = tl.load(rank_ptr + first + other, mask=inside, other=0)
    cluster = tl.load(cluster_ptr + first + other, mask=inside, other=0)
    weight = tl.load(weights_ptr + first + other, mask=inside, other=0.0)
    own_cluster = tl.load(cluster_ptr + first + token)
    own_rank = tl.load(rank_ptr + first + token)
    own_weight = tl.load(weights_ptr + first + token)
    loose = inside & (cluster == own_cluster) & (rank != cluster)
    total = tl.sum(tl.where(loose, weight, 0.0), 0)
    shared = (1 - beta) * own_weight / tl.where(total > 0, total, 1.0)
    centre = tl.where(total > 0, beta, 1.0)
    tl.store(shares_ptr + first + token, tl.where(own_rank == own_cluster, centre, shared))


def row_warps(block: int) -> int:
    """Enough threads that each holds 8 numbers of a row of the table."""
    return max(1, min(16, block // 256))


def cluster_tokens(x: Tensor, begins: Tensor, counts: Tensor, *, neighbours: int, max_size: int) -> Clusters:
    """As `token_merge.cluster_tokens`; all tensors are contiguous. Needs 4 * G * max_size^2 bytes."""
    tokens, d = x.shape
    groups = len(counts)
    assert x.is_contiguous(), "x is contiguous"
    assert begins.dtype == counts.dtype == torch.int32, "begins and counts are int32"
    assert len(begins) == groups + 1, "one count per group"
    assert max_size <= MAX_SIZE, f"Expected groups of up to {MAX_SIZE} tokens, but got {max_size}"
    rank, cluster = (torch.empty(tokens, dtype=torch.int32, device=x.device) for _ in range(2))
    if tokens == 0:
        return Clusters(rank, cluster)
    new = partial(torch.empty, device=x.device, dtype=torch.float32)
    squared = new(groups, max_size, max_size)
    density, widest, score = (new(tokens) for _ in range(3))
    tiles = triton.cdiv(max_size, BLOCK_PAIRS)
    squared_distances_fwd_kernel[(tiles, tiles, groups)](
        x, begins, squared, max_size,
        D=d, BLOCK=BLOCK_PAIRS, BLOCK_D=BLOCK_CHANNELS, num_warps=4,
    )  # fmt: skip
    grid, block = (max_size, groups), triton.next_power_of_2(max_size)
    settings = {"BLOCK": block, "num_warps": row_warps(block)}
    density_fwd_kernel[grid](squared, begins, counts, density, widest, max_size, neighbours, **settings)
    peaks_fwd_kernel[grid](squared, begins, density, widest, score, max_size, **settings)
    rank_fwd_kernel[grid](score, begins, rank, **settings)
    assign_fwd_kernel[grid](squared, begins, counts, rank, cluster, max_size, **settings)
    return Clusters(rank, cluster)


def merge_weights(
    clusters: Clusters, begins: Tensor, weights: Tensor, *, beta: float, max_size: int
) -> Tensor:
    """As `token_merge.merge_weights`; all tensors are contiguous."""
    assert weights.dtype == torch.float32, "weights are fp32"
    assert max_size <= MAX_SIZE, f"Expected groups of up to {MAX_SIZE} tokens, but got {max_size}"
    shares = torch.empty_like(weights)
    block = triton.next_power_of_2(max_size)
    if weights.numel():
        merge_weights_fwd_kernel[(max_size, len(begins) - 1)](
            *clusters, begins, weights, shares, beta, BLOCK=block, num_warps=row_warps(block)
        )
    return shares
