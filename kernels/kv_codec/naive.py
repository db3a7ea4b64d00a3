"""Oracle of the page codec: fp32 torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmserve.kernels.kv_codec.pages import LARGEST, QuantizedPages
from mmserve.kernels.paged_decode.naive_pages import read_pages


def store_slots(pages: QuantizedPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As `kv_codec.store_slots`."""
    scales = pages.scales
    _store_rows(pages.k, scales.k_scale, scales.k_zero, k, slots)
    _store_rows(pages.v, scales.v_scale, scales.v_zero, v, slots)


def store_pages(pages: QuantizedPages, k: Tensor, v: Tensor, page_ids: Tensor, counts: Tensor) -> None:
    """As `kv_codec.store_pages`."""
    page_size, scales = k.shape[1], pages.scales
    slots = page_slots(page_ids, counts, page_size).flatten()
    _store_rows(pages.v, scales.v_scale, scales.v_zero, v.flatten(0, 1), slots)
    if scales.key_axis == "slot":
        _store_rows(pages.k, scales.k_scale, scales.k_zero, k.flatten(0, 1), slots)
        return
    # a page without slots keeps its scales; slots that are not there count like the first
    known = counts > 0
    k, page_ids, inside = k[known], page_ids[known].long(), slots.view(k.shape[:2])[known] >= 0
    rows = torch.where(inside[..., None], k, k[:, :1]).float()
    numbers, scale, zero = quantize(rows.transpose(1, 2), pages.k.dtype, scales.k_scale.dtype)
    kept = slots[slots >= 0]
    pages.k.view(-1, pages.k.shape[2])[kept] = pack(numbers.transpose(1, 2)[inside], pages.k.dtype)
    scales.k_scale[page_ids] = scale
    if scales.k_zero is not None:
        scales.k_zero[page_ids] = zero


def load_pages(pages: QuantizedPages, page_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `kv_codec.load_pages`, but fp32."""
    k, v = read_pages(pages.k, pages.v, page_ids.long(), pages.scales)
    shape = (len(page_ids), -1, pages.width)
    return k.view(shape), v.view(shape)


def hadamard(x: Tensor) -> Tensor:
    """As `kv_codec.hadamard`, but fp32."""
    d = x.shape[-1]
    turned: Tensor = x.float() @ hadamard_matrix(d).to(x.device) / float(d & -d) ** 0.5
    return turned


def hadamard_matrix(d: int) -> Tensor:
    """Signs [d, d]: blocks as large as the largest power of two that divides d, zeros elsewhere."""
    block = torch.ones(1, 1)
    while d % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    matrix: Tensor = torch.block_diag(*[block] * (d // len(block)))
    return matrix


def page_slots(page_ids: Tensor, counts: Tensor, page_size: int) -> Tensor:
    """Flat slots int64 [n, page_size] of pages; -1 from their count on."""
    offset = torch.arange(page_size, device=page_ids.device)
    return torch.where(offset < counts[:, None], page_ids.long()[:, None] * page_size + offset, -1)


def quantize(
    groups: Tensor, dtype: torch.dtype, scale_type: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Unpacked numbers like fp32 groups [..., n], and the scale and zero [...] of each group, as stored."""
    if dtype is torch.uint8:
        low, high = groups.aminmax(dim=-1)
        scale, zero = ((high - low) / LARGEST[dtype]).to(scale_type), low.to(scale_type)
    else:
        scale = (groups.abs().amax(-1) / LARGEST[dtype]).to(scale_type)
        zero = torch.zeros_like(scale)
    # a group of equal numbers has no steps
    steps = torch.where(scale > 0, 1 / scale.float(), 0.0)[..., None]
    scaled = (groups - zero.float()[..., None]) * steps
    limit = LARGEST[dtype]
    if dtype is torch.float8_e4m3fn:
        return scaled.clamp(-limit, limit), scale, zero
    low_limit = 0.0 if dtype is torch.uint8 else -limit
    return torch.floor(scaled + 0.5).clamp(low_limit, limit), scale, zero


def pack(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """As they are stored: int4 has channel c in the low half of byte c, c + d / 2 in its high half."""
    if dtype is not torch.uint8:
        return numbers.to(dtype)
    low, high = numbers.to(dtype).chunk(2, dim=-1)
    return low | high << 4


def _store_rows(pages: Tensor, scale: Tensor, zero: Tensor | None, rows: Tensor, slots: Tensor) -> None:
    kept = slots >= 0
    numbers, row_scale, row_zero = quantize(rows[kept].float(), pages.dtype, scale.dtype)
    pages.view(-1, pages.shape[2])[slots[kept]] = pack(numbers, pages.dtype)
    scale.view(-1)[slots[kept]] = row_scale
    if zero is not None:
        zero.view(-1)[slots[kept]] = row_zero
