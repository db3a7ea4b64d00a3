"""What stands between a decoder layer's products: RMSNorm, RoPE or M-RoPE, and the way into the pages."""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.norm_rope import naive
from mmserve.kernels.norm_rope.naive import axes_of_pairs

__all__ = ["axes_of_pairs", "rerotate", "rms_norm", "rope_append"]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normed rows and the rows that were normed: x [N, D], plus residual [N, D], rounded to their dtype."""
    if backend_for(x.device) == "naive":
        normed, total = naive.rms_norm(x, weight, eps=eps, residual=residual)
        return normed.to(x.dtype), total
    # triton is imported only where it runs
    from mmserve.kernels.norm_rope import triton

    return triton.rms_norm(x, weight, eps=eps, residual=residual)


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
    """Rotated queries [N, Hq, d]; rotated keys and values go into their pages.

    qkv [N, Hq + 2 * Hkv, d] are queries, keys and values of N new tokens. positions int32 are [N], or
    [N, axes] with axis_of_pair int32 [d / 2] (`axes_of_pairs`); frequencies fp32 [d / 2]. Flat slots int64
    [Hkv, N] are places in pages [pages, page_size, d], none twice; a negative one is not stored. With
    q_weight and k_weight [d], queries and keys are normed first.
    """
    chosen = {"axis_of_pair": axis_of_pair, "q_weight": q_weight, "k_weight": k_weight}
    if backend_for(qkv.device) == "naive":
        q = naive.rope_append(qkv, positions, frequencies, slots, k_pages, v_pages, **chosen, eps=eps)
        return q.to(qkv.dtype)
    from mmserve.kernels.norm_rope import triton

    return triton.rope_append(qkv, positions, frequencies, slots, k_pages, v_pages, **chosen, eps=eps)


def rerotate(
    k_pages: Tensor,
    v_pages: Tensor,
    source: Tensor,
    destination: Tensor,
    delta: Tensor,
    frequencies: Tensor,
) -> None:
    """Copy slots, keys turned by `delta` positions (any axes: turning all of them alike is turning one).

    source and destination int64 [N] are flat slots of pages [pages, page_size, d], delta int32 [N]. No
    destination appears twice or is a source.
    """
    if backend_for(k_pages.device) == "naive":
        naive.rerotate(k_pages, v_pages, source, destination, delta, frequencies)
        return
    from mmserve.kernels.norm_rope import triton

    triton.rerotate(k_pages, v_pages, source, destination, delta, frequencies)
