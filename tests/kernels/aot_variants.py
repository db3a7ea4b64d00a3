"""Compiles kernels for chips that are not there; run as a program, it writes one JSON object per variant.

A program of its own, because Triton's interpreter, which the other tests use, cannot compile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from triton.runtime.jit import JITFunction

from mmserve.kernels.aot import compile_ahead
from mmserve.kernels.merge_lse import triton as merge
from mmserve.kernels.paged_decode import triton as decode
from mmserve.kernels.paged_decode.naive_pages import PageScales
from mmserve.kernels.prefill_attention import triton as prefill

CHIPS = (80, 90, 100)
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Variant(NamedTuple):
    name: str
    kernel: JITFunction
    arguments: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int


def prefill_variant(
    name: str,
    chip: int,
    *,
    d: int = 128,
    paged: bool = False,
    ordered: bool = False,
    slots: bool = False,
    described: bool = False,
    skip: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 7,
) -> Variant:
    rows = prefill.default_tile_rows(d)
    config = prefill.default_config(d, dtype.itemsize, rows, chip)
    constants = prefill.constants(
        dtype, d=d, kv_heads=4, group=group, tile_rows=rows, block_size=128,
        page_size=32 if paged else 0, skip=skip, config=config,
    )  # fmt: skip
    data = POINTER[dtype]
    optional = {
        "k_desc": f"tensordesc<{data[1:]}[{config.block_keys},{d}]>" if described else None,
        "v_desc": f"tensordesc<{data[1:]}[{config.block_keys},{d}]>" if described else None,
        "key_order_ptr": "*i32" if ordered else None,
        "key_slot_ptr": "*i32" if slots else None,
        "tables_ptr": "*i32" if paged else None,
    }
    arguments = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), data)
    arguments |= {"lse_ptr": "*fp32", "key_begin_ptr": "*i64", "scale_log2": "fp32", "skip_log2": "fp32"}
    lists = ("tiles", "rows", "runs", "blocks", "columns", "row_order")
    arguments |= {f"{part}_ptr": "*i32" for part in lists}
    arguments |= dict.fromkeys(("stride_k", "stride_kh", "stride_v", "stride_vh", "max_pages"), "i32")
    arguments |= {part: kind for part, kind in optional.items() if kind}
    constants |= {part: None for part, kind in optional.items() if not kind}
    return Variant(
        name, prefill.prefill_attention_fwd_kernel, arguments, constants, config.num_warps, config.num_stages
    )


def decode_variant(
    name: str,
    pages: torch.dtype = torch.bfloat16,
    *,
    d: int = 128,
    group: int = 7,
    key_axis: str | None = None,
    zeros: bool = False,
    mass: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Variant:
    nothing = torch.empty(0)
    scales = PageScales(key_axis=key_axis, k_scale=nothing, v_scale=nothing) if key_axis else None  # type: ignore[arg-type]  # a literal
    config = decode.default_config(32, scales)
    constants = decode.constants(
        dtype, pages, d=d, group=group, page_size=32, splits=8, scales=scales, config=config
    )
    optional = {
        "k_scale_ptr": key_axis is not None,
        "v_scale_ptr": key_axis is not None,
        "k_zero_ptr": zeros,
        "v_zero_ptr": zeros,
        "scores_ptr": mass,
    }
    arguments = {"q_ptr": POINTER[dtype], "k_ptr": POINTER[pages], "v_ptr": POINTER[pages]}
    arguments |= {"tables_ptr": "*i32", "lengths_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    arguments |= {"scale_log2": "fp32", "max_pages": "i32"}
    arguments |= {part: "*fp32" for part, used in optional.items() if used}
    constants |= {part: None for part, used in optional.items() if not used}
    return Variant(
        name, decode.paged_decode_fwd_kernel, arguments, constants, config.num_warps, config.num_stages
    )


def merge_variant() -> Variant:
    arguments = {"outs_ptr": "*fp32", "lses_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    arguments |= {"parts": "i32", "rows": "i32"}
    constants: dict[str, object] = {"D": 128, "BLOCK_D": 128, "BLOCK_ROWS": merge.BLOCK_ROWS}
    return Variant("merge_lse", merge.merge_lse_fwd_kernel, arguments, constants, 4, 3)


def mass_variant() -> Variant:
    arguments = dict.fromkeys(("scores_ptr", "lse_ptr", "mass_ptr"), "*fp32")
    arguments |= {"lengths_ptr": "*i32", "slots": "i32"}
    constants: dict[str, object] = {"GROUP": 7, "BLOCK_G": 8, "BLOCK_SLOTS": decode.MASS_SLOTS}
    return Variant("attention_mass", decode.attention_mass_fwd_kernel, arguments, constants, 4, 3)


def variants(chip: int) -> Iterator[Variant]:
    """What serving uses on a chip; descriptors from sm_90 on, fp8 needs more than sm_80."""
    described = chip >= 90
    yield prefill_variant("prefill", chip, described=described)
    yield prefill_variant("prefill_paged", chip, paged=True)
    yield prefill_variant("prefill_ordered_paged", chip, paged=True, ordered=True, slots=True)
    yield prefill_variant("prefill_ordered", chip, ordered=True, described=described)
    if prefill.can_skip(chip):
        yield prefill_variant("prefill_skip", chip, skip=True, described=described)
    yield prefill_variant("prefill_d64", chip, d=64, described=described)
    yield prefill_variant("prefill_d80", chip, d=80)
    yield prefill_variant("prefill_d256", chip, d=256, described=described)
    yield prefill_variant("prefill_fp16", chip, dtype=torch.float16, described=described)
    yield decode_variant("decode")
    yield decode_variant("decode_mass", mass=True)
    yield decode_variant("decode_d64", d=64, group=4)
    yield decode_variant("decode_d256", d=256)
    yield decode_variant("decode_int8", torch.int8, key_axis="slot")
    yield decode_variant("decode_int8_channel", torch.int8, key_axis="channel")
    yield decode_variant("decode_int4", torch.uint8, key_axis="slot", zeros=True)
    yield decode_variant("decode_int4_channel", torch.uint8, key_axis="channel", zeros=True)
    if chip >= 90:
        yield decode_variant("decode_fp8", torch.float8_e4m3fn, key_axis="slot")
    yield decode_variant("decode_fp32", torch.float32, dtype=torch.float32)
    yield merge_variant()
    yield mass_variant()


def main(chips: list[int], names: list[str]) -> None:
    """Compile the named variants, all by default."""
    for chip in chips or CHIPS:
        for variant in variants(chip):
            if names and variant.name not in names:
                continue
            compiled = compile_ahead(
                variant.kernel, variant.arguments, variant.constants,
                capability=chip, num_warps=variant.num_warps, num_stages=variant.num_stages,
            )  # fmt: skip
            sys.stdout.write(json.dumps({"name": variant.name, "chip": chip, **compiled._asdict()}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:] if word.isdigit()], [w for w in sys.argv[1:] if not w.isdigit()])
