"""Kernels compiled for chips that are not there: no spills, shared memory, tensor cores, async copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmserve.kernels.aot import SHARED_LIMIT

ROOT = Path(__file__).parent.parent.parent


def compiled(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What tests/kernels/aot_variants.py says of these chips and variants; a process without interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_variants", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(variants: list[dict[str, Any]]) -> None:
    for variant in variants:
        name, chip = variant["name"], variant["chip"]
        said = f"{name} on sm_{chip}: {variant}"
        assert variant["stack_bytes"] == 0, said
        assert variant["shared_bytes"] <= SHARED_LIMIT[chip], said
        if name.startswith("prefill"):
            assert variant["tensor_core_instructions"] > 0, said
        elif name.startswith("decode"):
            # 16 rows of queries are too few for a warp group: mma.sync on every chip
            assert variant["mma_instructions"] > 0, said
        if name.startswith(("prefill", "decode")):
            assert variant["async_copies"] > 0, said


def test_the_main_variants_compile(tmp_path: Path) -> None:
    found = compiled(tmp_path, "90", "prefill_paged", "decode", "merge_lse")
    assert [variant["name"] for variant in found] == ["prefill_paged", "decode", "merge_lse"]
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("chip", sorted(SHARED_LIMIT))
def test_every_variant_compiles(tmp_path: Path, chip: int) -> None:
    found = compiled(tmp_path, str(chip))
    assert len(found) >= 18
    check(found)
