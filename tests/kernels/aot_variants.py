"""Kernels with all that a compiler has to know of a launch: types, constants, warps and stages.

Builders for the kernels that serving launches, which tests/attention/served_variants.py calls with the
shapes of models, and the shapes and types beside those. Knows nothing about compiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from mmserve.kernels.kv_codec import triton as codec
from mmserve.kernels.merge_lse import triton as merge
from mmserve.kernels.norm_rope import triton as norm
from mmserve.kernels.paged_decode import triton as decode
from mmserve.kernels.paged_decode.naive_pages import PageScales
from mmserve.kernels.prefill_attention import triton as prefill

POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
Kind = Literal["floats", "ints", "longs", "scalar", "size"]
TYPES: dict[str, str] = {"floats": "*fp32", "ints": "*i32", "longs": "*i64", "scalar": "fp32", "size": "i32"}


class Variant(NamedTuple):
    name: str
    kernel: JITFunction
    arguments: dict[str, str]  # types of the arguments that are not constants
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    # on tensor cores: "own" by the chip's own instruction, "any" by that or mma.sync, which all chips have
    products: Literal["none", "any", "own"] = "none"
    copies: bool = False  # asynchronous ones, ahead of their use


def typed(rows: str = "", dtype: torch.dtype = torch.bfloat16, **kinds: str) -> dict[str, str]:
    """Arguments by type: `typed("x", ints="a b")` says x_ptr points to dtype, a_ptr and b_ptr to int32."""
    found = {f"{name}_ptr": POINTER[dtype] for name in rows.split()}
    for kind, names in kinds.items():
        for name in names.split():
            found[name if kind in ("scalar", "size") else f"{name}_ptr"] = TYPES[kind]
    return found


def prefill_variant(
    name: str,
    chip: int,
    *,
    d: int = 128,
    paged: bool = False,
    sparse: bool = True,
    ordered: bool = False,
    slots: bool = False,
    skip: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Variant:
    rows = prefill.default_tile_rows(d, dtype.itemsize)
    config = prefill.default_config(d, dtype.itemsize, rows, chip, skip=skip)
    constants = prefill.constants(
        dtype, d=d, tile_rows=rows, block_size=128 if sparse else rows,
        page_size=32 if paged else 0, sparse=sparse, skip=skip, config=config,
    )  # fmt: skip
    data = POINTER[dtype]
    # as the launcher decides
    described = chip >= 90 and not paged and not slots and d & (d - 1) == 0 and d >= 16
    optional = {
        "k_desc": f"tensordesc<{data[1:]}[{config.block_keys},{d}]>" if described else None,
        "v_desc": f"tensordesc<{data[1:]}[{config.block_keys},{d}]>" if described else None,
        "key_order_ptr": "*i32" if ordered else None,
        "key_slot_ptr": "*i32" if slots else None,
        "tables_ptr": "*i32" if paged else None,
    }
    arguments = typed(
        "q k v out", dtype, floats="lse", longs="key_begin", ints="tiles rows runs blocks columns row_order",
        scalar="scale_log2 skip_log2", size="stride_k stride_kh stride_v stride_vh max_pages kv_heads group",
    )  # fmt: skip
    arguments |= {part: kind for part, kind in optional.items() if kind}
    constants |= {part: None for part, kind in optional.items() if not kind}
    # tiles in fp32 may have too few rows for a warp group
    return Variant(
        name, prefill.prefill_attention_fwd_kernel, arguments, constants, config.num_warps, config.num_stages,
        products="any" if dtype is torch.float32 else "own", copies=True,
    )  # fmt: skip


def decode_variant(
    name: str,
    pages: torch.dtype = torch.bfloat16,
    *,
    d: int = 128,
    group: int = 7,
    is_split: bool = True,
    key_axis: Literal["slot", "channel"] | None = None,
    zeros: bool = False,
    mass: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Variant:
    nothing = torch.empty(0)
    scales = PageScales(key_axis=key_axis, k_scale=nothing, v_scale=nothing) if key_axis else None
    config = decode.default_config(32, scales, dtype.itemsize)
    constants = decode.constants(dtype, pages, d=d, group=group, page_size=32, scales=scales, config=config)
    optional = {
        "k_scale_ptr": key_axis is not None,
        "v_scale_ptr": key_axis is not None,
        "k_zero_ptr": zeros,
        "v_zero_ptr": zeros,
        "scores_ptr": mass,
    }
    arguments = typed(
        "k v", pages, ints="tables lengths", floats="lse", scalar="scale_log2", size="max_pages"
    )
    # one split is the result, several are merged in fp32
    arguments |= typed("q", dtype) | typed("out", torch.float32 if is_split else dtype)
    types = {part: "*fp32" if part == "scores_ptr" else "*fp16" for part in optional}
    arguments |= {part: types[part] for part, used in optional.items() if used}
    constants |= {part: None for part, used in optional.items() if not used}
    # 16 rows of queries are too few for a warp group: mma.sync on every chip
    return Variant(
        name, decode.paged_decode_fwd_kernel, arguments, constants,
        config.num_warps, config.num_stages, products="any", copies=True,
    )  # fmt: skip


def merge_variant(
    name: str, *, d: int, dtype: torch.dtype = torch.bfloat16, is_split: bool = True
) -> Variant:
    """As the second stage of decode: from fp32 to the type of its queries; or of outputs in that type."""
    arguments = typed("out", dtype, floats="lses lse", size="parts rows")
    arguments |= typed("outs", torch.float32 if is_split else dtype)
    return Variant(name, merge.merge_lse_fwd_kernel, arguments, merge.constants(d))


def rms_norm_variant(
    name: str, *, width: int, residual: bool, dtype: torch.dtype = torch.bfloat16
) -> Variant:
    arguments = typed("x weight out", dtype, scalar="eps")
    constants: dict[str, object] = norm.norm_constants(width)
    if residual:
        arguments |= typed("residual total", dtype)
    else:
        constants |= {"residual_ptr": None, "total_ptr": None}
    return Variant(name, norm.rms_norm_fwd_kernel, arguments, constants, norm.norm_warps(width))


def rope_append_variant(
    name: str,
    *,
    heads: int,
    kv_heads: int,
    d: int,
    axes: int = 1,
    normed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Variant:
    arguments = typed(
        "qkv q k_pages v_pages", dtype, ints="positions", floats="frequencies", longs="slots",
        size="tokens", scalar="eps",
    )  # fmt: skip
    constants = norm.rope_constants(heads, kv_heads, d, axes)
    optional = {"axis_of_pair_ptr": axes > 1, "q_weight_ptr": normed, "k_weight_ptr": normed}
    types = typed("q_weight k_weight", dtype, ints="axis_of_pair")
    arguments |= {part: types[part] for part, used in optional.items() if used}
    constants |= {part: None for part, used in optional.items() if not used}
    return Variant(name, norm.rope_append_fwd_kernel, arguments, constants)


def store_variants(
    name: str, pages: torch.dtype, *, d: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Variant]:
    """Of whole pages: rows of values by slot, and pages of keys by channel."""
    has_zeros = pages is torch.uint8
    stored = {"pages_ptr": POINTER[pages], "scale_ptr": "*fp16"} | (
        {"zero_ptr": "*fp16"} if has_zeros else {}
    )
    constants: dict[str, object] = {**codec.constants(pages, d), **({} if has_zeros else {"zero_ptr": None})}
    arguments = typed("x", dtype, longs="slots", size="rows") | stored
    rows = constants | {"BLOCK_ROWS": codec.BLOCK_ROWS}
    yield Variant(f"store_rows_{name}", codec.store_rows_fwd_kernel, arguments, rows)
    arguments = typed("x", dtype, ints="page_ids counts") | stored
    channels = constants | {"PAGE_SIZE": 32, "BLOCK_SLOTS": 32}
    yield Variant(f"store_channels_{name}", codec.store_channels_fwd_kernel, arguments, channels)


def mass_variant() -> Variant:
    arguments = typed(floats="scores lse mass", ints="lengths", size="slots")
    constants: dict[str, object] = {"GROUP": 7, "BLOCK_G": 8, "BLOCK_SLOTS": decode.MASS_SLOTS}
    return Variant("attention_mass", decode.attention_mass_fwd_kernel, arguments, constants)


def attention_variants(chip: int) -> Iterator[Variant]:
    """Beside what serving uses; fp8 needs more than sm_80."""
    yield prefill_variant("prefill", chip)
    yield prefill_variant("prefill_paged", chip, paged=True)
    yield prefill_variant("prefill_ordered_paged", chip, paged=True, ordered=True, slots=True)
    yield prefill_variant("prefill_ordered", chip, ordered=True)
    if prefill.can_skip(chip):
        yield prefill_variant("prefill_skip", chip, skip=True)
    for d in (8, 40, 72, 80, 96, 136, 192, 256):
        yield prefill_variant(f"prefill_d{d}", chip, d=d)
    yield prefill_variant("prefill_d256_paged", chip, d=256, paged=True)
    yield decode_variant("decode_mass", mass=True)
    for d in (8, 72, 80, 192, 256):
        yield decode_variant(f"decode_d{d}", d=d, group=4)
    yield decode_variant("decode_int8", torch.int8, key_axis="slot")
    yield decode_variant("decode_int8_channel", torch.int8, key_axis="channel")
    yield decode_variant("decode_int4", torch.uint8, key_axis="slot", zeros=True)
    yield decode_variant("decode_int4_channel", torch.uint8, key_axis="channel", zeros=True)
    if chip >= 90:
        yield decode_variant("decode_fp8", torch.float8_e4m3fn, key_axis="slot")
    yield mass_variant()
    yield rms_norm_variant("rms_norm_8192", width=8192, residual=True)
    yield rope_append_variant("mrope_append_normed", heads=28, kv_heads=4, d=128, axes=3, normed=True)
