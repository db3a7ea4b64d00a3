"""Attention of one new row per sequence over its paged KV; `cpu.py` is the one that serving uses on a CPU."""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.paged_decode import naive_pages
from mmserve.kernels.paged_decode.naive_pages import Decoded, PageScales

__all__ = ["Decoded", "PageScales", "paged_decode"]


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    scales: PageScales | None = None,
    mass: bool = False,
) -> Decoded:
    """Outputs like q [B, Hq, d] over pages [pages, page_size, d] (int4: uint8 [pages, page_size, d / 2]).

    tables int32 [B, Hkv, max_pages], lengths int32 [B, Hkv], zero allowed; query head h reads KV head
    h // (Hq / Hkv). Pages of integers or fp8 need `scales`; `mass` asks for the weights per slot.
    """
    if backend_for(q.device) == "naive":
        found = naive_pages.paged_decode(
            q, k_pages, v_pages, tables, lengths, scale=scale, scales=scales, mass=mass
        )
        return found._replace(out=found.out.to(q.dtype))
    # triton is imported only where it runs
    from mmserve.kernels.paged_decode import triton

    return triton.paged_decode(q, k_pages, v_pages, tables, lengths, scale=scale, scales=scales, mass=mass)
