"""The kernels as CudaAttention launches them for the models we serve, for the tests that compile ahead.

One axis per KV head, so KV_HEADS is 1 throughout; pages of 32 slots; bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from tests.kernels.aot_variants import Variant, decode_variant, prefill_variant

SHAPES = ((64, 7), (128, 7))  # channels and query heads per KV head of ov-0.5b and ov-7b


def served_variants(chip: int) -> Iterator[Variant]:
    """Names begin as those of `aot_variants`, so that its checks apply."""
    for (d, group), paged in product(SHAPES, (False, True)):
        name = f"prefill_served_d{d}{'_paged' if paged else ''}"
        # slots in one run are read by descriptors where the chip has them
        variant = prefill_variant(
            name, chip, d=d, group=group, paged=paged, described=chip >= 90 and not paged
        )
        yield variant._replace(constants=variant.constants | {"KV_HEADS": 1})
    for d, group in SHAPES:
        yield decode_variant(f"decode_served_d{d}", torch.bfloat16, d=d, group=group)
