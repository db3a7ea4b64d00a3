"""The probe of bf16 tensors on a CPU against the oracle."""

from __future__ import annotations

import pytest
import torch

from mmserve.kernels import pattern_index
from mmserve.kernels.pattern_index import cpu, naive


@pytest.mark.parametrize(
    ("rows", "keys", "group", "with_order"),
    [(1, 1, 1, False), (5, 150, 4, True), (64, 64, 7, False), (17, 300, 1, True)],
)
def test_probe_equals_oracle(rows: int, keys: int, group: int, with_order: bool) -> None:
    generator = torch.Generator().manual_seed(keys)
    q, k = (
        torch.randn(count, heads, 16, generator=generator).bfloat16()
        for count, heads in ((rows, 2 * group), (keys, 2))
    )
    order = (torch.arange(keys) + torch.arange(keys) // 3).int() if with_order else None
    row_order = (torch.arange(keys).int() if order is None else order)[-rows:]
    found = pattern_index.probe(q, k, row_order, order, scale=0.5)
    expected = naive.probe(q, k, row_order, order, scale=0.5)
    # weights of rounded scores differ by a few parts in a hundred, one by one, and less in their sums
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * rows**0.5, rtol=0.02)
    torch.testing.assert_close(found.slash.sum(-1), torch.full((2 * group,), float(rows)), atol=1e-2, rtol=0)


def test_a_row_that_sees_nothing_weighs_nothing() -> None:
    q, k = torch.ones(2, 1, 8).bfloat16(), torch.ones(3, 1, 8).bfloat16()
    orders = torch.tensor([5, 6, 7]).int()
    found = cpu.probe(q, k, torch.tensor([1, 6]).int(), orders, scale=1.0)
    assert found.vertical.tolist() == [[0.5, 0.5, 0.0]]


def test_keys_may_be_a_view_of_pages() -> None:
    pages = torch.randn(2, 40, 16).bfloat16()
    q = torch.randn(8, 4, 16).bfloat16()
    rows = torch.arange(32, 40).int()
    strided = cpu.probe(q, pages.transpose(0, 1), rows, None, scale=0.3)
    whole = cpu.probe(q, pages.transpose(0, 1).contiguous(), rows, None, scale=0.3)
    torch.testing.assert_close(strided, whole)


def test_what_has_to_be_exact_goes_to_the_oracle() -> None:
    q = torch.randn(2, 1, 8)
    assert not cpu.is_available(q, q)
