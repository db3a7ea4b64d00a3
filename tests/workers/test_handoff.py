"""Embeddings as they travel: bit for bit, or within the bound of their wire dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmserve.config import WireDtype
from mmserve.transfer import LeaseStore, MappedLeases
from mmserve.workers.handoff import columns_of, embedding_arrays, open_embeddings


def travelled(rows: Tensor, wire_dtype: WireDtype, directory: Path, like: Tensor | None = None) -> Tensor:
    with LeaseStore([directory]) as store:
        lease = store.publish(embedding_arrays(rows, wire_dtype), with_crc=True)
        return open_embeddings(lease, MappedLeases([directory]), rows[:0] if like is None else like)


def examples() -> Tensor:
    """Rows of very different sizes, an outlier in each, zeros, and the smallest numbers."""
    rows = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-6, 6, 40)[:, None]
    rows[:, 7] *= 30
    rows[3] = 0
    rows[4] = 1e-38
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = examples().to(dtype)
    found = travelled(rows, "auto", tmp_path)
    assert found.dtype == dtype
    assert torch.equal(found, rows)
    if dtype is torch.bfloat16:
        assert torch.equal(travelled(rows, "bf16", tmp_path), rows)


@pytest.mark.parametrize("wire_dtype", ["bf16", "fp8", "int8"])
def test_rounded_rows_are_within_their_bound(tmp_path: Path, wire_dtype: WireDtype) -> None:
    rows = examples()
    found = travelled(rows, wire_dtype, tmp_path)
    largest = rows.abs().amax(-1, keepdim=True)
    bounds = {
        "bf16": rows.abs() / 256,
        "int8": largest / 254,
        "fp8": torch.maximum(rows.abs() / 16, largest / 458752),
    }
    error = (found - rows).abs()
    # rows this small come back as zeros
    assert (error <= bounds[wire_dtype] * 1.001 + 2.0**-100).all()
    assert (error > 0).any()


def test_a_number_that_no_scale_can_hold_travels_as_it_is(tmp_path: Path) -> None:
    rows = examples()
    rows[0, 0] = 2.0**125
    rows[1, 1] = torch.inf
    for wire_dtype in ("int8", "fp8"):
        assert torch.equal(travelled(rows, wire_dtype, tmp_path), rows)


def test_the_readers_dtype_counts(tmp_path: Path) -> None:
    rows = examples()
    like = torch.zeros(0, dtype=torch.bfloat16)
    assert travelled(rows, "int8", tmp_path, like).dtype == torch.bfloat16
    assert torch.equal(travelled(rows, "auto", tmp_path, like), rows.bfloat16())


def test_a_byte_a_number_is_what_travels(tmp_path: Path) -> None:
    rows = examples()
    with LeaseStore([tmp_path]) as store:
        sizes = {
            kind: store.publish(embedding_arrays(rows, kind)).total_bytes
            for kind in ("auto", "bf16", "fp8", "int8")
        }
        lease = store.publish(embedding_arrays(rows, "int8") | {"key": torch.zeros(3).numpy()})
    assert list(columns_of(lease)) == ["key"]
    assert sizes["bf16"] < 0.52 * sizes["auto"]
    assert sizes["int8"] == sizes["fp8"] < 0.32 * sizes["auto"]
