"""Which attention serves which device. Knows nothing about what it computes."""

from __future__ import annotations

import torch

from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention
from mmserve.attention.quantized import CpuDecoding, Decoding, PageDecoding

ATTENTION: dict[str, type[PagedAttention]] = {"cpu": CpuAttention, "cuda": CudaAttention}


def attention_for(device: torch.device) -> type[PagedAttention]:
    """The fastest attention over paged KV for a device."""
    return ATTENTION.get(device.type, PagedAttention)


def decoding_for(device: torch.device) -> type[Decoding]:
    """The fastest attention of decodes over quantized pages."""
    return CpuDecoding if device.type == "cpu" else PageDecoding
