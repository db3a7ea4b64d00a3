"""Merging of visual tokens over time and space, for many clips and groups of any size at once.

Clips and groups are ranges of packed tokens [N, D], described on the device; the host needs to know upper
bounds of their sizes only, so nothing waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.token_merge import naive
from mmserve.kernels.token_merge.naive import Clusters

__all__ = ["Clusters", "cluster_tokens", "frame_cosine", "merge_weights", "run_lengths", "scatter_merge"]


def frame_cosine(x: Tensor, clips: Tensor, *, max_tokens: int) -> Tensor:
    """Cosine of each token x [N, D] with its position in the next frame: fp32 [N], -inf in the last.

    clips int32 [clips, 3]: first token, frames, tokens of a frame. No clip has more than max_tokens tokens;
    every token belongs to one clip.
    """
    if backend_for(x.device) == "naive":
        return naive.frame_cosine(x, clips)
    # triton is imported only where it runs
    from mmserve.kernels.token_merge import triton

    return triton.frame_cosine(x, clips, max_tokens=max_tokens)


def run_lengths(cosine: Tensor, clips: Tensor, *, tau: float, max_width: int) -> Tensor:
    """How many consecutive links above tau start at each token: int32 [N]; no frame is wider than max_width.

    A position is static over frames i to j of a clip where the run of frame i is at least j - i.
    """
    if backend_for(cosine.device) == "naive":
        return naive.run_lengths(cosine, clips, tau=tau)
    from mmserve.kernels.token_merge import triton

    return triton.run_lengths(cosine, clips, tau=tau, max_width=max_width)


def cluster_tokens(x: Tensor, begins: Tensor, counts: Tensor, *, neighbours: int, max_size: int) -> Clusters:
    """DPC-KNN: reduce each group of tokens x [N, D] to counts int32 [G] clusters, from 1 to its size.

    Group g is the tokens begins[g] to begins[g + 1], int32 [G + 1], at most max_size, and may be empty. The
    distance is Euclidean over the square root of D, the density the mean over min(neighbours, count) tokens,
    itself included. Equal densities, scores and distances are decided by index.
    """
    if backend_for(x.device) == "naive":
        return naive.cluster_tokens(x, begins, counts, neighbours=neighbours)
    from mmserve.kernels.token_merge import triton

    return triton.cluster_tokens(x, begins, counts, neighbours=neighbours, max_size=max_size)


def merge_weights(
    clusters: Clusters, begins: Tensor, weights: Tensor, *, beta: float, max_size: int
) -> Tensor:
    """The share of each token in its merged token, fp32 [N]; those of a cluster sum to 1.

    A centre has beta and the others share 1 - beta by their weights fp32 [N], or it has all without others.
    """
    if backend_for(weights.device) == "naive":
        return naive.merge_weights(clusters, begins, weights, beta=beta)
    from mmserve.kernels.token_merge import triton

    return triton.merge_weights(clusters, begins, weights, beta=beta, max_size=max_size)


def scatter_merge(x: Tensor, begins: Tensor, cluster: Tensor, shares: Tensor, *, max_count: int) -> Tensor:
    """Sums of share * token over each cluster of each group: [G, max_count, D], 0 where no cluster is.

    cluster int32 [N] is below max_count. Sums are fp32 in the order of the tokens, rounded once to x's dtype.
    """
    if backend_for(x.device) == "naive":
        return naive.scatter_merge(x, begins, cluster, shares, max_count=max_count).to(x.dtype)
    from mmserve.kernels.token_merge import triton

    return triton.scatter_merge(x, begins, cluster, shares, max_count=max_count)
