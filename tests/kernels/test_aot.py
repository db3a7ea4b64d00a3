"""Kernels compiled for chips that are not there: no spills, shared memory, tensor cores, async copies.

What serving launches is compiled in the quick set, every other variant in the slow one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmserve.kernels.aot import SHARED_LIMIT, compile_ahead
from tests.attention.served_variants import served_variants
from tests.kernels.aot_program import variants

ROOT = Path(__file__).parent.parent.parent
CHIPS = sorted(SHARED_LIMIT)
Found = dict[str, Any]


def compiled(folder: Path, *words: str) -> list[Found]:
    """What tests/kernels/aot_program.py says to these words; a process without interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_program", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(found: list[Found]) -> None:
    for variant in found:
        said = f"{variant['name']} on sm_{variant['chip']}: {variant}"
        assert variant["stack_bytes"] == 0, said
        assert variant["shared_bytes"] <= SHARED_LIMIT[variant["chip"]], said
        if variant["products"] == "own":
            assert variant["tensor_core_instructions"] > 0, said
        elif variant["products"] == "any":
            assert variant["tensor_core_instructions"] + variant["mma_instructions"] > 0, said
        if variant["copies"]:
            assert variant["async_copies"] > 0, said
        assert (variant["descriptor_copies"] > 0) == variant["described"], said


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """All chips in one process: starting it takes as long as some variants."""
    return compiled(tmp_path_factory.mktemp("triton"), "served")


@pytest.mark.parametrize("chip", CHIPS)
def test_what_serving_launches_compiles(served: list[Found], chip: int) -> None:
    found = [variant for variant in served if variant["chip"] == chip]
    assert [variant["name"] for variant in found] == [variant.name for variant in served_variants(chip)]
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant_compiles(tmp_path: Path, chip: int) -> None:
    found = compiled(tmp_path, "all", str(chip))
    assert [variant["name"] for variant in found] == [variant.name for variant in variants("all", chip)]
    check(found)


def test_no_two_variants_have_one_name() -> None:
    for chip in CHIPS:
        assert max(Counter(variant.name for variant in variants("all", chip)).values()) == 1


def test_an_argument_without_a_type_is_found() -> None:
    variant = next(served_variants(90))
    with pytest.raises(ValueError, match="but k_ptr has none"):
        compile_ahead(
            variant.kernel,
            {name: kind for name, kind in variant.arguments.items() if name != "k_ptr"},
            variant.constants,
            capability=90,
            num_warps=4,
            num_stages=2,
        )
