"""KV pages in int8, int4 or fp8 as `paged_decode` reads them, and the rotation that helps them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.kv_codec import naive
from mmserve.kernels.kv_codec.cpu import try_store_pages
from mmserve.kernels.kv_codec.pages import QuantizedPages, empty_pages

__all__ = ["QuantizedPages", "empty_pages", "hadamard", "load_pages", "store_pages", "store_slots"]


def store_slots(pages: QuantizedPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Put rows k and v [n, d] into flat slots int64 [n], none twice; a negative slot is not stored.

    For pages whose keys are scaled by slot: a scale by channel needs all slots of its page at once.
    """
    assert pages.scales.key_axis == "slot", "keys scaled by channel are stored by page"
    if backend_for(k.device) == "naive":
        naive.store_slots(pages, k, v, slots)
        return
    # triton is imported only where it runs
    from mmserve.kernels.kv_codec import triton

    triton.store_slots(pages, k, v, slots)


def store_pages(pages: QuantizedPages, k: Tensor, v: Tensor, page_ids: Tensor, counts: Tensor) -> None:
    """Put k and v [n, page_size, d] into whole pages page_ids int32 [n], none twice.

    Only the first counts int32 [n] slots of each are there; what the others hold is never read.
    """
    if backend_for(k.device) == "naive":
        if k.device.type != "cpu" or not try_store_pages(pages, k, v, page_ids, counts):
            naive.store_pages(pages, k, v, page_ids, counts)
        return
    from mmserve.kernels.kv_codec import triton

    triton.store_pages(pages, k, v, page_ids, counts)


def load_pages(pages: QuantizedPages, page_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V [n, page_size, d] of pages page_ids int32 [n], as prefill reads them: once per chunk."""
    if backend_for(page_ids.device) == "naive":
        k, v = naive.load_pages(pages, page_ids)
        return k.to(dtype), v.to(dtype)
    from mmserve.kernels.kv_codec import triton

    return triton.load_pages(pages, page_ids, dtype)


def hadamard(x: Tensor) -> Tensor:
    """x [..., d] times an orthonormal Hadamard matrix; twice is x again.

    Spreads outlier channels before numbers are rounded. Scores do not change when queries and keys are both
    rotated; when values are, so is the output.
    """
    if backend_for(x.device) == "naive":
        return naive.hadamard(x).to(x.dtype)
    from mmserve.kernels.kv_codec import triton

    return triton.hadamard(x)
