"""Index building in Triton's interpreter against its oracles, and those against the plainest form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmserve.kernels import pattern_index
from mmserve.kernels.pattern_index import naive, triton
from mmserve.kernels.pattern_index.blocks import triton as blocks_triton
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*shape: int, **kwargs: object) -> Tensor:
        memory: Tensor = empty(*shape, **kwargs)  # type: ignore[call-overload]  # as torch.empty takes them
        return memory.fill_(torch.nan if memory.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", poisoned)


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def scattered(count: int) -> Tensor:
    """Ascending orders with gaps, as those of one modality."""
    return (torch.arange(count) + torch.arange(count) // 3).int()


@pytest.mark.parametrize(
    ("dtype", "rows", "keys", "group", "d", "with_order"),
    [
        (torch.float32, 1, 1, 1, 8, False),
        (torch.float32, 5, 150, 4, 24, True),
        (torch.float16, 64, 70, 7, 64, False),
        (torch.bfloat16, 17, 129, 1, 80, True),
    ],
)
def test_probe_equals_oracle(
    dtype: torch.dtype,
    rows: int,
    keys: int,
    group: int,
    d: int,
    with_order: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "SPLIT_KEYS", 64)
    q, k = uniform(rows, 2 * group, d, seed=0).to(dtype), uniform(keys, 2, d, seed=1).to(dtype)
    order = scattered(keys) if with_order else None
    row_order = (torch.arange(keys).int() if order is None else order)[-rows:]
    expected = naive.probe(q, k, row_order, order, scale=2 * d**-0.5)
    found = triton.probe(q, k, row_order, order, scale=2 * d**-0.5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert found.vertical.shape == found.slash.shape == (2 * group, keys)
    torch.testing.assert_close(found.slash.sum(-1), torch.full((2 * group,), float(rows)), atol=1e-2, rtol=0)


def test_probe_oracle_equals_sums_over_the_map() -> None:
    q, k = uniform(3, 1, 8, seed=2), uniform(5, 1, 8, seed=3)
    scores = q[:, 0] @ k[:, 0].T
    weights = torch.softmax(scores.masked_fill(torch.ones(3, 5).triu(3).bool(), -torch.inf), -1)
    found = naive.probe(q, k, torch.tensor([2, 3, 4]).int(), None, scale=1.0)
    torch.testing.assert_close(found.vertical[0], weights.sum(0))
    diagonals = [weights.diagonal(2 - offset).sum() for offset in range(5)]
    torch.testing.assert_close(found.slash[0], torch.stack(diagonals))


def test_rows_that_see_nothing_add_nothing() -> None:
    q, k = uniform(2, 1, 8, seed=4), uniform(6, 1, 8, seed=5)
    row_order, key_order = torch.tensor([3, 40]).int(), torch.arange(10, 16).int()
    found = triton.probe(q, k, row_order, key_order, scale=1.0)
    expected = naive.probe(q, k, row_order, key_order, scale=1.0)
    torch.testing.assert_close(found.vertical, expected.vertical)
    assert abs(float(found.vertical.sum()) - 1) < 1e-5


def test_residues_equal_oracle() -> None:
    vertical = uniform(3, 333, seed=6).abs()
    vertical[2] = 0
    strides = torch.tensor([1, 7, 16, 65, 130, 333, 400], dtype=torch.int32)
    expected = naive.residue_scores(vertical, strides, first=5, last=300)
    found = triton.residue_scores(vertical, strides, first=5, last=300)
    torch.testing.assert_close(found.lift, expected.lift, atol=1e-6, rtol=0)
    # all classes of an empty axis are equal, so are those of a stride that does not fit once
    assert torch.equal(found.residue, expected.residue)


@pytest.mark.parametrize(("stride", "phase"), [(28, 3), (36, 0), (24, 17)])
def test_the_lift_finds_the_stride_where_raw_mass_does_not(stride: int, phase: int) -> None:
    vertical = 0.2 + 0.1 * uniform(1, 2000, seed=7).abs()
    vertical[:, phase::stride] += 4
    vertical[:, :8] += 50
    vertical[:, -40:] += 20
    strides = torch.tensor([4, 7, 12, stride, stride + 1, 2 * stride, 5 * stride], dtype=torch.int32)
    lift, residue = naive.residue_scores(vertical, strides, first=8, last=1960)
    best, heaviest = int(lift[0].argmax()), int((lift[0] + 1 / strides).argmax())
    assert int(strides[heaviest]) != stride
    assert (int(strides[best]), int(residue[0, best])) == (stride, phase)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "keys", "group", "block"), [(5, 20, 1, 8), (40, 150, 4, 9), (1, 1, 7, 4), (33, 100, 7, 16)]
)
def test_block_scores_equal_oracle(rows: int, keys: int, group: int, block: int, dtype: torch.dtype) -> None:
    q, k = uniform(rows, 2 * group, 24, seed=8).to(dtype), uniform(keys, 2, 24, seed=9).to(dtype)
    order = scattered(keys)
    for key_order, row_order in ((order, order[-rows:]), (None, torch.arange(keys - rows, keys).int())):
        expected = naive.block_scores(q, k, row_order, key_order, block=block, scale=1.0)
        found = blocks_triton.block_scores(q, k, row_order, key_order, block=block, scale=1.0)
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    assert found.isinf().any() == (rows > block)
    sizes: dict[str, Any] = {"block": block, "key_block": 2 * block, "scale": 1.0}
    expected = naive.block_scores(q, k, order[-rows:], order, **sizes)
    found = blocks_triton.block_scores(q, k, order[-rows:], order, **sizes)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    assert found.shape[2] == -(-keys // (2 * block))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "keys", "group", "block"), [(5, 20, 1, 8), (70, 150, 2, 4), (9, 70, 4, 16), (3, 65, 7, 2)]
)
def test_columns_are_those_near_the_largest(
    rows: int, keys: int, group: int, block: int, dtype: torch.dtype
) -> None:
    q, k = uniform(rows, 2 * group, 24, seed=10).to(dtype), uniform(keys, 2, 24, seed=11).to(dtype)
    order = scattered(keys)
    row_order = order[-rows:]
    blocks = -(-rows // block)
    key_end = torch.arange(blocks).int() * block + keys - rows
    limits: dict[str, Any] = {"block": block, "scale": 3.0, "sink": 4, "capacity": keys}
    found = blocks_triton.select_columns(q, k, row_order, order, key_end, alpha=2.0, **limits)
    slack = 5 * TOLERANCE[dtype]
    wide, narrow = (
        naive.select_columns(q, k, row_order, order, key_end, alpha=2.0 + change, **limits)
        for change in (slack, -slack)
    )
    for head in range(2 * group):
        for at in range(blocks):
            chosen, upper, lower = (
                columns[head, at, : int(counts[head, at])].tolist()
                for columns, counts in (found, wide, narrow)
            )
            assert chosen == sorted(set(chosen)), "ascending, none twice"
            assert set(lower) <= set(chosen) <= set(upper)
    assert (found.counts > 0).any()


def test_columns_past_the_capacity_are_left_out() -> None:
    q, k = uniform(3, 1, 8, seed=12), uniform(100, 1, 8, seed=13)
    rows, ends = torch.arange(97, 100).int(), torch.tensor([90]).int()
    call: dict[str, Any] = {"block": 4, "scale": 1.0, "alpha": 100.0, "sink": 2, "capacity": 70}
    for select in (naive.select_columns, blocks_triton.select_columns):
        columns, counts = select(q, k, rows, None, ends, **call)
        assert counts.tolist() == [[70]]
        assert columns[0, 0].tolist() == list(range(2, 72))


def test_dispatch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, rows = uniform(9, 2, 8, seed=14), uniform(20, 1, 8, seed=15), torch.arange(11, 20).int()
    found = []
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        vertical, slash = pattern_index.probe(q, k, rows, None, scale=1.0)
        residues = pattern_index.residue_scores(vertical, torch.tensor([3, 4]).int(), first=1, last=18)
        scores = pattern_index.block_scores(q, k, rows, None, block=4, scale=1.0)
        ends = torch.full((3,), 11, dtype=torch.int32)
        limits: dict[str, Any] = {"block": 4, "scale": 1.0, "alpha": 50.0, "sink": 1, "capacity": 10}
        columns = pattern_index.select_columns(q, k, rows, None, ends, **limits)
        found.append([vertical, slash, *residues, scores, *columns])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
