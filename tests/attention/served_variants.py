"""The kernels as serving launches them on a GPU, for the tests that compile ahead.

tests/kernels/test_served.py runs a step of
each kind and compares what was launched with what is here. Knows nothing about compiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch

from mmserve.kernels.kv_codec.pages import PAGE_TYPES
from tests.kernels.aot_variants import (
    Variant,
    decode_variant,
    merge_variant,
    prefill_variant,
    rms_norm_variant,
    rope_append_variant,
    store_variants,
)


class Model(NamedTuple):
    """What of a language model the kernels are compiled for."""

    hidden: int
    heads: int
    kv_heads: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    qk_norm: bool = False


# those of the README and of the benchmarks, and what Qwen3 has in addition
MODELS = {
    "tiny": Model(256, 4, 2, 64),
    "ov-0.5b": Model(896, 14, 2, 64),
    "ov-7b": Model(3584, 28, 4, 128),
    "ov-7b-qk-norm": Model(3584, 28, 4, 128, qk_norm=True),
}


def model_variants(name: str, model: Model, chip: int) -> Iterator[Variant]:
    d, dtype, group = model.d, model.dtype, model.heads // model.kv_heads
    yield prefill_variant(f"prefill_contiguous_{name}", chip, d=d, sparse=False, dtype=dtype)
    yield prefill_variant(f"prefill_paged_{name}", chip, d=d, paged=True, sparse=False, dtype=dtype)
    yield decode_variant(f"decode_{name}", dtype, d=d, group=group, is_split=False, dtype=dtype)
    yield decode_variant(f"decode_split_{name}", dtype, d=d, group=group, dtype=dtype)
    yield merge_variant(f"merge_lse_{name}", d=d, dtype=dtype)
    for residual in (False, True):
        kind = "residual" if residual else "first"
        yield rms_norm_variant(f"rms_norm_{kind}_{name}", width=model.hidden, residual=residual, dtype=dtype)
    yield rope_append_variant(
        f"rope_append_{name}", heads=model.heads, kv_heads=model.kv_heads, d=d,
        normed=model.qk_norm, dtype=dtype,
    )  # fmt: skip


def quantized_variants(name: str, model: Model, pages: torch.dtype) -> Iterator[Variant]:
    """What answers in pages of this type add, `name` being that of both."""
    d, dtype, group = model.d, model.dtype, model.heads // model.kv_heads
    for is_split in (False, True):
        label = f"decode_split_{name}" if is_split else f"decode_{name}"
        yield decode_variant(
            label, pages, d=d, group=group, is_split=is_split, key_axis="channel",
            zeros=pages is torch.uint8, dtype=dtype,
        )  # fmt: skip
    yield merge_variant(f"merge_newest_{name}", d=d, dtype=dtype, is_split=False)
    yield from store_variants(name, pages, d=d, dtype=dtype)


def served_variants(chip: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Variant]:
    """Each once, however many models share it. Checkpoints are served in their own dtype by default."""
    seen: list[Variant] = []
    suffix = {torch.bfloat16: "", torch.float16: "_fp16", torch.float32: "_fp32"}[dtype]
    models = {name + suffix: model._replace(dtype=dtype) for name, model in MODELS.items()}
    of_models = [model_variants(name, model, chip) for name, model in models.items()]
    if dtype is torch.bfloat16:
        of_models += [
            quantized_variants(f"tiny_{kind}", MODELS["tiny"], pages) for kind, pages in codecs(chip)
        ]
    for variant in chain.from_iterable(of_models):
        if all(other != variant._replace(name=other.name) for other in seen):
            seen.append(variant)
            yield variant


def codecs(chip: int) -> list[tuple[str, torch.dtype]]:
    """Types of quantized pages that a chip has: fp8 needs more than sm_80."""
    return [(kind, pages) for kind, pages in PAGE_TYPES.items() if kind != "fp8" or chip >= 90]
