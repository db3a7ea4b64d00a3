"""Attention over a union of key sets from the attention over each of them, exactly."""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.merge_lse import naive
from mmserve.kernels.merge_lse.naive import Partial


def merge_lse(outs: Tensor, lses: Tensor) -> Partial:
    """outs [parts, ..., d] and fp32 lses [parts, ...] of disjoint key sets; out has the dtype of outs."""
    if backend_for(outs.device) == "naive":
        out, lse = naive.merge_lse(outs, lses)
        return Partial(out.to(outs.dtype), lse)
    # triton is imported only where it runs
    from mmserve.kernels.merge_lse import triton

    return triton.merge_lse(outs, lses)
