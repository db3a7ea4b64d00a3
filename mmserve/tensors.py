"""Torch tensors as the arrays that leases and frames carry, and back, without copies on the CPU.

Kept apart from wire.py and transfer.py because processes without torch import those.
"""

from __future__ import annotations

from typing import Final

import torch

from mmserve.errors import WireError
from mmserve.lease import ArrayHeader, Lease
from mmserve.wire import Array, TypedArray

_DTYPES: Final[dict[str, torch.dtype]] = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_BITS: Final = {
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


def to_numpy(tensor: torch.Tensor) -> TypedArray:
    """The tensor's bytes as a contiguous array; shares memory with a contiguous CPU tensor."""
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise WireError("Expected a tensor of a dtype that can travel, but got another")
    dense = tensor.detach().cpu().contiguous()
    bits = _BITS.get(dense.dtype)
    return TypedArray((dense if bits is None else dense.view(bits)).numpy(), name)


def to_torch(array: Array, header: ArrayHeader) -> torch.Tensor:
    """The tensor that the header describes; shares memory where the array may be written.

    Arrays of an opened lease are private copy-on-write pages behind a read-only flag, so they are
    shared; a write to the tensor reaches nobody else.
    """
    view = array.view()
    try:
        view.flags.writeable = True
    except ValueError:
        # memory that is truly read-only, such as a received frame
        view = array.copy()
    bits = torch.from_numpy(view)
    dtype = _DTYPES[header.dtype]
    return bits.view(dtype) if dtype in _BITS else bits


def tensors_of(lease: Lease, arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    """The opened arrays of a lease as tensors."""
    opened = [header for header in lease.arrays if header.name in arrays]
    return {header.name: to_torch(arrays[header.name], header) for header in opened}
