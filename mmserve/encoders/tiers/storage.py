"""How the numbers of an embedding are stored: as they are, or one byte each with a scale per row.

What comes back differs from what went in by at most this, before it is rounded to its own dtype again
(`a` is the largest absolute value of the row, `x` one of its values):

- raw: nothing.
- int8: a / 254, and a thousandth of that for rounding in fp32.
- fp8 (e4m3): the larger of |x| / 16 and a / 458752 (half a step of the smallest numbers), and a thousandth.

Rows whose `a` is below 2^-100 come back as zeros; an entry with a number of 2^120 or more, or none at all, is
stored raw. Knows nothing about saliency, which is always stored exactly.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from mmserve.kernels.kv_codec.naive import pack, quantize

Storage = Literal["raw", "int8", "fp8"]
DTYPES: Final[dict[str, torch.dtype]] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# below it the inverse of a scale is no finite number
_SMALLEST = 2.0**-100
_TOO_LARGE = 2.0**120


def storage_for(rows: Tensor, wanted: Storage) -> Storage:
    """`wanted`, or raw where a scale could not hold the rows."""
    return wanted if wanted == "raw" or bool((rows.abs() < _TOO_LARGE).all()) else "raw"


def shrink(rows: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Rows [N, D] that `storage_for` lets pass as one byte a number, and the scale fp32 [N] of each row."""
    dtype, full = DTYPES[storage], rows.float()
    tiny = full.abs().amax(-1, keepdim=True) < _SMALLEST
    numbers, scale, _ = quantize(full.masked_fill(tiny, 0.0), dtype)
    return pack(numbers, dtype), scale


def restore(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [N, D] of `shrink` in the dtype they had."""
    return (numbers.float() * scale[:, None]).to(dtype)
