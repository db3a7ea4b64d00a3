"""Compiles the codec, norm, saliency, merging and index kernels for chips that are not there.

Run as a program it compiles and writes one JSON object per variant: Triton's interpreter, which the tests
use, cannot compile, so the test starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mmserve.kernels.aot import SHARED_LIMIT, compile_ahead
from mmserve.kernels.kv_codec import triton as codec
from mmserve.kernels.kv_codec.pages import PAGE_TYPES
from mmserve.kernels.norm_rope import triton as norm
from mmserve.kernels.pattern_index import triton as pattern
from mmserve.kernels.pattern_index.blocks import triton as blocks
from mmserve.kernels.saliency import triton as saliency
from mmserve.kernels.token_merge import triton as merge
from mmserve.kernels.token_merge.dpc_knn import triton as dpc

CHIPS = (80, 90, 100)
ROOT = Path(__file__).parent.parent.parent
STORED = {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}
ROW = "*bf16"
TYPES = {"rows": ROW, "floats": "*fp32", "ints": "*i32", "longs": "*i64", "scalar": "fp32", "size": "i32"}
# they walk over rows that should arrive ahead of them
LOOPS = ("row_lse", "column_sums", "probe_lse", "select_columns", "scatter_merge", "squared_distances")


class Variant(NamedTuple):
    name: str
    kernel: object
    arguments: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    multiplies: bool = False  # on tensor cores


def typed(**kinds: str) -> dict[str, str]:
    """Arguments by type: `typed(ints="a b")` says that a_ptr and b_ptr are pointers to int32."""
    found = {}
    for kind, names in kinds.items():
        for name in names.split():
            found[name if kind in ("scalar", "size") else f"{name}_ptr"] = TYPES[kind]
    return found


def norm_variants() -> Iterator[Variant]:
    kernel = norm.rms_norm_fwd_kernel
    for width in (3584, 8192):
        shape: dict[str, object] = {"D": width, "BLOCK_D": 4096 if width == 3584 else width}
        arguments = typed(rows="x residual weight out total", scalar="eps")
        yield Variant(f"rms_norm_{width}", kernel, arguments, shape, norm.norm_warps(width))
    for name, axes, normed in (("rope_append", 1, False), ("mrope_append_normed", 3, True)):
        heads = {"Q_HEADS": 28, "KV_HEADS": 4, "AXES": axes, "PAIRS": 64, "BLOCK_P": 64}
        arguments = typed(
            rows="qkv q k_pages v_pages", ints="positions", floats="frequencies", longs="slots",
            size="tokens", scalar="eps",
        )  # fmt: skip
        constants: dict[str, object] = {**heads, "BLOCK_HEADS": norm.BLOCK_HEADS}
        for optional, used in (("axis_of_pair", axes > 1), ("q_weight", normed), ("k_weight", normed)):
            if used:
                arguments[f"{optional}_ptr"] = "*i32" if optional == "axis_of_pair" else ROW
            else:
                constants[f"{optional}_ptr"] = None
        yield Variant(name, norm.rope_append_fwd_kernel, arguments, constants)
    arguments = typed(
        rows="k_pages v_pages", longs="source destination", ints="delta", floats="frequencies", size="count"
    )
    moved: dict[str, object] = {"PAIRS": 64, "BLOCK_P": 64, "BLOCK_SLOTS": norm.BLOCK_SLOTS}
    yield Variant("rerotate", norm.rerotate_fwd_kernel, arguments, moved)


def codec_variants(chip: int) -> Iterator[Variant]:
    for kind, dtype in PAGE_TYPES.items():
        if kind == "fp8" and chip < 90:
            continue
        fixed = codec.constants(dtype, 128)
        zero = {"zero_ptr": "*fp32"} if kind == "int4" else {}
        none: dict[str, object] = {} if kind == "int4" else {"zero_ptr": None}
        stored = {"pages_ptr": STORED[kind], **zero}
        arguments = typed(rows="x", longs="slots", floats="scale", size="rows") | stored
        constants = {**fixed, **none, "BLOCK_ROWS": codec.BLOCK_ROWS}
        yield Variant(f"store_rows_{kind}", codec.store_rows_fwd_kernel, arguments, constants)
        paged = {"PAGE_SIZE": 32, "BLOCK_SLOTS": 32}
        arguments = typed(rows="x", ints="page_ids counts", floats="scale") | stored
        yield Variant(
            f"store_channels_{kind}", codec.store_channels_fwd_kernel, arguments, {**fixed, **none, **paged}
        )
        arguments = typed(rows="out", ints="page_ids", floats="scale") | stored
        halves = {"HALF": 64, "BLOCK_HALF": 64, "BLOCK_SLOTS": codec.BLOCK_ROWS, "PAGE_SIZE": 32}
        for by_channel in (False, True):
            constants = {**halves, **none, "BY_CHANNEL": by_channel, "INT4": kind == "int4"}
            name = f"load_pages_{kind}{'_channel' if by_channel else ''}"
            yield Variant(name, codec.load_pages_fwd_kernel, arguments, constants)
    for d in (128, 80):
        arguments = typed(rows="x out", scalar="scale", size="rows")
        constants = codec.hadamard_constants(torch.bfloat16, d)
        yield Variant(f"hadamard_{d}", codec.hadamard_fwd_kernel, arguments, constants, multiplies=True)


def saliency_variants() -> Iterator[Variant]:
    sizes = "tokens stride_q stride_qh stride_k stride_kh"
    config = saliency.Config()
    for d in (72, 80):
        constants = saliency.constants(torch.bfloat16, d, config)
        arguments = typed(rows="q k", ints="begins", floats="lse", scalar="scale_log2", size=sizes)
        yield Variant(
            f"row_lse_{d}", saliency.row_lse_fwd_kernel, arguments, constants, config.num_warps, True
        )
        arguments = arguments | {"sums_ptr": "*fp32"}
        yield Variant(
            f"column_sums_{d}", saliency.column_sums_fwd_kernel, arguments, constants, config.num_warps, True
        )


def merge_variants() -> Iterator[Variant]:
    wide: dict[str, object] = {"D": 3584, "BLOCK_D": merge.BLOCK_CHANNELS}
    arguments = typed(rows="x", ints="clips", floats="cosine")
    constants = wide | {"BLOCK_LINKS": merge.BLOCK_LINKS}
    yield Variant("frame_cosine", merge.frame_cosine_fwd_kernel, arguments, constants)
    arguments = typed(floats="cosine", ints="clips runs", scalar="tau")
    constants = {"BLOCK_POSITIONS": merge.BLOCK_POSITIONS}
    yield Variant("run_lengths", merge.run_lengths_fwd_kernel, arguments, constants)
    arguments = typed(rows="x merged", ints="begins cluster", floats="shares", size="max_count")
    constants = wide | {"BLOCK_CLUSTERS": merge.BLOCK_CLUSTERS, "BLOCK_TOKENS": merge.BLOCK_TOKENS}
    yield Variant("scatter_merge", merge.scatter_merge_fwd_kernel, arguments, constants)
    arguments = typed(rows="x", ints="begins", floats="squared", size="max_size")
    constants = {"D": 3584, "BLOCK": dpc.BLOCK_PAIRS, "BLOCK_D": dpc.BLOCK_CHANNELS}
    yield Variant("squared_distances", dpc.squared_distances_fwd_kernel, arguments, constants)
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


def pattern_variants() -> Iterator[Variant]:
    heads = pattern.head_constants(torch.bfloat16, 128, 4, 7)
    rows = {"ROWS": 64, "BLOCK_ROWS": 64, "BLOCK_KEYS": pattern.BLOCK_KEYS}
    call = typed(rows="q k", ints="row_order key_order", floats="lse", scalar="scale_log2", size="keys")
    constants = {**heads, **rows, "SPLIT_KEYS": pattern.SPLIT_KEYS}
    yield Variant("probe_lse", pattern.probe_lse_fwd_kernel, call, constants, multiplies=True)
    arguments = call | typed(floats="vertical diagonal wrapped")
    yield Variant("probe_sums", pattern.probe_sums_fwd_kernel, arguments, {**heads, **rows}, multiplies=True)
    arguments = typed(floats="vertical lift", ints="strides residue", size="keys first last")
    tile = dict(zip(("BLOCK_ROWS", "BLOCK_RESIDUES"), pattern.RESIDUE_TILE, strict=True))
    yield Variant("residue_scores", pattern.residue_scores_fwd_kernel, arguments, {**tile})
    constants = {"HEADS": 28, "D": 128, "BLOCK_D": 128, "POOL_ROWS": blocks.POOL_ROWS}
    arguments = typed(rows="x out", size="rows block")
    yield Variant("pool_rows", blocks.pool_rows_fwd_kernel, arguments, constants)
    arguments = typed(
        rows="q k", ints="row_order key_order", floats="scores", scalar="scale", size="rows keys"
    )
    constants = {**heads, "TILE": blocks.SCORE_TILE}
    yield Variant("block_scores", blocks.block_scores_fwd_kernel, arguments, constants, multiplies=True)
    arguments = typed(
        rows="q k",
        ints="row_order key_end columns counts",
        scalar="scale alpha",
        size="rows keys sink capacity",
    )
    tile = dict(zip(("BLOCK_ROWS", "BLOCK_KEYS"), blocks.SELECT_TILE, strict=True))
    constants = {**heads, **tile, "key_order_ptr": None}
    yield Variant("select_columns", blocks.select_columns_fwd_kernel, arguments, constants, multiplies=True)


def variants(chip: int) -> Iterator[Variant]:
    yield from norm_variants()
    yield from codec_variants(chip)
    yield from saliency_variants()
    yield from merge_variants()
    yield from pattern_variants()


def main(chips: list[int], names: list[str]) -> None:
    """Compile the named variants, all by default."""
    for chip in chips or CHIPS:
        for variant in variants(chip):
            if names and variant.name not in names:
                continue
            try:
                compiled = compile_ahead(
                    variant.kernel, variant.arguments, variant.constants,
                    capability=chip, num_warps=variant.num_warps, num_stages=3,
                )  # fmt: skip
            except Exception as error:
                error.add_note(f"{variant.name} for {chip}")
                raise
            found = {"name": variant.name, "chip": chip, "multiplies": variant.multiplies}
            sys.stdout.write(json.dumps({**found, **compiled._asdict()}) + "\n")
            sys.stdout.flush()


def compiled(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What this file says as a program, of these chips and variants; a process without interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_aot_more", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for variant in found:
        assert variant["stack_bytes"] == 0, variant
        assert variant["shared_bytes"] <= SHARED_LIMIT[variant["chip"]], variant
        if variant["multiplies"]:
            assert variant["tensor_core_instructions"] + variant["mma_instructions"] > 0, variant
        if variant["name"].startswith(LOOPS):
            assert variant["async_copies"] > 0, variant


def test_some_variants_compile(tmp_path: Path) -> None:
    names = ["rope_append", "store_channels_int4", "probe_sums"]
    found = compiled(tmp_path, "90", *names)
    assert [variant["name"] for variant in found] == names
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant_compiles(chip: int, tmp_path: Path) -> None:
    found = compiled(tmp_path, str(chip))
    assert [variant["name"] for variant in found] == [variant.name for variant in variants(chip)]
    check(found)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:] if word.isdigit()], [w for w in sys.argv[1:] if not w.isdigit()])
