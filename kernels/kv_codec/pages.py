"""Quantized pages: their types, their scales, their memory. Knows nothing about how numbers get in or out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmserve.kernels.paged_decode.naive_pages import PageScales

Kind = Literal["int8", "int4", "fp8"]
KeyAxis = Literal["slot", "channel"]
PAGE_TYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
# KIVI's; numbers beyond its largest, 65504, cannot be the zero of a group
SCALE_TYPE = torch.float16
# the largest number stored; int4 counts from 0 and has a zero, the others are symmetric
LARGEST = {torch.int8: 127.0, torch.uint8: 15.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedPages:
    """K and V [pages, page_size, d] (int4: d / 2 bytes) as `paged_decode` reads them, and their scales."""

    k: Tensor
    v: Tensor
    scales: PageScales

    @property
    def width(self) -> int:
        """Channels of a slot."""
        return self.k.shape[2] * (2 if self.k.dtype is torch.uint8 else 1)


def empty_pages(
    kind: Kind, pages: int, page_size: int, d: int, *, key_axis: KeyAxis, device: torch.device | str = "cpu"
) -> QuantizedPages:
    """Pages of zeros; scales too are zeros, so what was never written reads as 0."""
    dtype = PAGE_TYPES[kind]
    width = d // 2 if kind == "int4" else d
    rows = page_size if key_axis == "slot" else d
    k, v = (torch.zeros(pages, page_size, width, dtype=dtype, device=device) for _ in range(2))
    k_scale, k_zero = (torch.zeros(pages, rows, dtype=SCALE_TYPE, device=device) for _ in range(2))
    v_scale, v_zero = (torch.zeros(pages, page_size, dtype=SCALE_TYPE, device=device) for _ in range(2))
    has_zeros = kind == "int4"
    scales = PageScales(
        key_axis=key_axis,
        k_scale=k_scale,
        v_scale=v_scale,
        k_zero=k_zero if has_zeros else None,
        v_zero=v_zero if has_zeros else None,
    )
    return QuantizedPages(k=k, v=v, scales=scales)
