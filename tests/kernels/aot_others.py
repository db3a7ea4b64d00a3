"""Variants beside those that serving launches: codec, saliency, merging, index, `rerotate`.

With the shapes of LLaVA-OneVision 7B. Knows nothing about compiling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmserve.kernels.kv_codec import triton as codec
from mmserve.kernels.kv_codec.pages import PAGE_TYPES
from mmserve.kernels.norm_rope import triton as norm
from mmserve.kernels.pattern_index import triton as pattern
from mmserve.kernels.pattern_index.blocks import triton as blocks
from mmserve.kernels.saliency import triton as saliency
from mmserve.kernels.token_merge import triton as merge
from mmserve.kernels.token_merge.dpc_knn import triton as dpc
from tests.kernels.aot_variants import POINTER, Variant, store_variants, typed


def other_variants(chip: int) -> Iterator[Variant]:
    arguments = typed(
        "k_pages v_pages", longs="source destination", ints="delta", floats="frequencies", size="count"
    )
    moved: dict[str, object] = {"PAIRS": 64, "BLOCK_P": 64, "BLOCK_SLOTS": norm.BLOCK_SLOTS}
    yield Variant("rerotate", norm.rerotate_fwd_kernel, arguments, moved)
    yield from codec_variants(chip)
    yield from saliency_variants()
    yield from merge_variants()
    yield from cluster_variants()
    yield from probe_variants()
    yield from block_variants()


def codec_variants(chip: int) -> Iterator[Variant]:
    for kind, dtype in PAGE_TYPES.items():
        if kind == "fp8" and chip < 90:
            continue
        zero = {"zero_ptr": "*fp16"} if kind == "int4" else {}
        none: dict[str, object] = {} if kind == "int4" else {"zero_ptr": None}
        stored = {"pages_ptr": POINTER[dtype], "scale_ptr": "*fp16", **zero}
        yield from store_variants(kind, dtype)
        arguments = typed("out", ints="page_ids") | stored
        halves = {"HALF": 64, "BLOCK_HALF": 64, "BLOCK_SLOTS": codec.BLOCK_ROWS, "PAGE_SIZE": 32}
        for by_channel in (False, True):
            constants = {**halves, **none, "BY_CHANNEL": by_channel, "INT4": kind == "int4"}
            name = f"load_pages_{kind}{'_channel' if by_channel else ''}"
            yield Variant(name, codec.load_pages_fwd_kernel, arguments, constants)
    for d in (128, 80):
        arguments = typed("x out", scalar="scale", size="rows")
        constants = codec.hadamard_constants(torch.bfloat16, d)
        yield Variant(f"hadamard_{d}", codec.hadamard_fwd_kernel, arguments, constants, products="any")


def saliency_variants() -> Iterator[Variant]:
    config = saliency.Config()
    for d in (72, 80):
        constants = saliency.constants(torch.bfloat16, d, config)
        arguments = typed(
            "q k", ints="begins", floats="lse", scalar="scale_log2",
            size="tokens stride_q stride_qh stride_k stride_kh",
        )  # fmt: skip
        row_lse = Variant(f"row_lse_{d}", saliency.row_lse_fwd_kernel, arguments, constants)
        sums = {"arguments": arguments | {"sums_ptr": "*fp32"}, "kernel": saliency.column_sums_fwd_kernel}
        for variant in (row_lse, row_lse._replace(name=f"column_sums_{d}", **sums)):
            yield variant._replace(num_warps=config.num_warps, products="any", copies=True)


def merge_variants() -> Iterator[Variant]:
    wide: dict[str, object] = {"D": 3584, "BLOCK_D": merge.BLOCK_CHANNELS}
    arguments = typed("x", ints="clips", floats="cosine")
    constants = wide | {"BLOCK_LINKS": merge.BLOCK_LINKS}
    yield Variant("frame_cosine", merge.frame_cosine_fwd_kernel, arguments, constants)
    arguments = typed(floats="cosine", ints="clips runs", scalar="tau")
    constants = {"BLOCK_POSITIONS": merge.BLOCK_POSITIONS}
    yield Variant("run_lengths", merge.run_lengths_fwd_kernel, arguments, constants)
    arguments = typed("x merged", ints="begins cluster", floats="shares", size="max_count")
    constants = wide | {"BLOCK_CLUSTERS": merge.BLOCK_CLUSTERS, "BLOCK_TOKENS": merge.BLOCK_TOKENS}
    yield Variant("scatter_merge", merge.scatter_merge_fwd_kernel, arguments, constants, copies=True)


def cluster_variants() -> Iterator[Variant]:
    arguments = typed("x", ints="begins", floats="squared", size="max_size")
    constants: dict[str, object] = {"D": 3584, "BLOCK": dpc.BLOCK_PAIRS, "BLOCK_D": dpc.BLOCK_CHANNELS}
    yield Variant("squared_distances", dpc.squared_distances_fwd_kernel, arguments, constants, copies=True)
    rows = {
        "density": typed(floats="squared density widest", ints="begins counts", size="max_size neighbours"),
        "peaks": typed(floats="squared density widest score", ints="begins", size="max_size"),
        "rank": typed(floats="score", ints="begins rank"),
        "assign": typed(floats="squared", ints="begins counts rank cluster", size="max_size"),
        "merge_weights": typed(floats="weights shares", ints="rank cluster begins", scalar="beta"),
    }
    for block in (256, dpc.MAX_SIZE):
        for name, arguments in rows.items():
            kernel = getattr(dpc, f"{name}_fwd_kernel")
            yield Variant(f"{name}_{block}", kernel, arguments, {"BLOCK": block}, dpc.row_warps(block))


def probe_variants() -> Iterator[Variant]:
    rows = {"ROWS": 64, "BLOCK_ROWS": 64, "BLOCK_KEYS": pattern.BLOCK_KEYS}
    constants = pattern.head_constants(torch.bfloat16, 128, 4, 7) | rows
    call = typed("q k", ints="row_order key_order", floats="lse", scalar="scale_log2", size="keys")
    split = constants | {"SPLIT_KEYS": pattern.SPLIT_KEYS}
    yield Variant("probe_lse", pattern.probe_lse_fwd_kernel, call, split, products="any", copies=True)
    arguments = call | typed(floats="vertical diagonal wrapped")
    yield Variant("probe_sums", pattern.probe_sums_fwd_kernel, arguments, constants, products="any")
    arguments = typed(floats="vertical lift", ints="strides residue", size="keys first last")
    tile: dict[str, object] = dict(zip(("BLOCK_ROWS", "BLOCK_RESIDUES"), pattern.RESIDUE_TILE, strict=True))
    yield Variant("residue_scores", pattern.residue_scores_fwd_kernel, arguments, tile)


def block_variants() -> Iterator[Variant]:
    heads = pattern.head_constants(torch.bfloat16, 128, 4, 7)
    constants: dict[str, object] = {"HEADS": 28, "D": 128, "BLOCK_D": 128, "POOL_ROWS": blocks.POOL_ROWS}
    arguments = typed("x out", size="rows block")
    yield Variant("pool_rows", blocks.pool_rows_fwd_kernel, arguments, constants)
    arguments = typed("q k", ints="row_order key_order", floats="scores", scalar="scale", size="rows keys")
    constants = heads | {"TILE": blocks.SCORE_TILE}
    yield Variant("block_scores", blocks.block_scores_fwd_kernel, arguments, constants, products="any")
    arguments = typed(
        "q k", ints="row_order key_end columns counts", scalar="scale alpha", size="rows keys sink capacity"
    )
    tile = dict(zip(("BLOCK_ROWS", "BLOCK_KEYS"), blocks.SELECT_TILE, strict=True))
    constants = {**heads, **tile, "key_order_ptr": None}
    yield Variant(
        "select_columns", blocks.select_columns_fwd_kernel, arguments, constants, products="any", copies=True
    )
