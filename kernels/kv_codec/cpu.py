"""The page codec on a CPU, compiled: whole pages. Knows nothing about tables, sequences or positions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmserve.kernels import native
from mmserve.kernels.kv_codec.pages import PAGE_TYPES, SCALE_TYPE, QuantizedPages

NATIVE_TYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 256
_KINDS = {dtype: number for number, dtype in enumerate(PAGE_TYPES.values())}


def try_store_pages(pages: QuantizedPages, k: Tensor, v: Tensor, page_ids: Tensor, counts: Tensor) -> bool:
    """As `kv_codec.store_pages`, with the oracle's numbers; False where nothing was done for lack of code."""
    kernel, d = _kernel(), pages.width
    if kernel is None or k.dtype not in NATIVE_TYPES or d > MAX_HEAD_DIM:
        return False
    scales = pages.scales
    is_by_channel = scales.key_axis == "channel"
    _store(kernel, k, page_ids, counts, pages.k, scales.k_scale, scales.k_zero, is_by_channel)
    _store(kernel, v, page_ids, counts, pages.v, scales.v_scale, scales.v_zero, False)
    return True


def _store(
    kernel: native.Function,
    rows: Tensor,
    page_ids: Tensor,
    counts: Tensor,
    pages: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    is_by_channel: bool,
) -> None:
    count, page_size, d = rows.shape
    tensors = (rows, page_ids, counts, pages, scale)
    assert all(tensor.is_contiguous() for tensor in tensors), "tensors are contiguous"
    assert page_ids.dtype == counts.dtype == torch.int32, "page_ids and counts are int32"
    assert scale.dtype is SCALE_TYPE, "scales are fp16"
    assert pages.shape[1] == page_size, "rows fit the pages"
    if count == 0:
        return
    for found, end in ((page_ids, len(pages)), (counts, page_size + 1)):
        assert int(found.min()) in range(end), "pages are there"
        assert int(found.max()) in range(end), "pages are there"
    pointers = (None if one is None else one.data_ptr() for one in (*tensors, zero))
    kind, is_bf16 = _KINDS[pages.dtype], rows.dtype is torch.bfloat16
    kernel(*pointers, count, page_size, d, kind, is_bf16, is_by_channel, torch.get_num_threads())


@cache
def _kernel() -> native.Function | None:
    source = Path(__file__).with_name("cpu.c")
    return native.function(source, "store_pages", pointers=6, sizes=3, flags=4)
