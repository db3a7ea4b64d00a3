"""The merge of partial attention: against attention over the union, and the kernel against its oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmserve.kernels.merge_lse import merge_lse, naive, triton
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def attend(q: Tensor, k: Tensor, v: Tensor) -> naive.Partial:
    scores = q @ k.T
    return naive.Partial(torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1))


def test_merged_parts_equal_attention_over_all_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 12, 12))
    parts = [attend(q, k[span], v[span]) for span in (slice(0, 1), slice(1, 9), slice(9, 12))]
    outs, lses = (torch.stack(kind) for kind in zip(*parts, strict=True))
    merged, whole = naive.merge_lse(outs, lses), attend(q, k, v)
    torch.testing.assert_close(merged.out.double(), whole.out, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged.lse.double(), whole.lse, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("parts", "shape", "d"), [(1, (3,), 8), (3, (2, 5), 24), (9, (1, 7), 128), (2, (3,), 200), (2, (1,), 256)]
)
def test_kernel_equals_oracle(
    parts: int, shape: tuple[int, ...], d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))
    generator = torch.Generator().manual_seed(1)
    outs = (2 * torch.rand(parts, *shape, d, generator=generator) - 1).to(dtype)
    # far apart: only the largest counts
    lses = 40 * torch.randn(parts, *shape, generator=generator)
    found, expected = triton.merge_lse(outs, lses), naive.merge_lse(outs, lses)
    assert found.out.dtype == dtype
    torch.testing.assert_close(found.out.float(), expected.out, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("merge", [triton.merge_lse, naive.merge_lse])
def test_parts_that_saw_nothing_may_hold_anything(merge: object) -> None:
    assert callable(merge)
    outs, lses = torch.ones(2, 3, 8), torch.zeros(2, 3)
    outs[0, 0] = torch.nan
    lses[0, 0] = -torch.inf
    outs[:, 1] = torch.nan
    lses[:, 1] = -torch.inf
    out, lse = merge(outs, lses)
    assert out.eq(torch.tensor([1.0, 0.0, 1.0])[:, None]).all()
    torch.testing.assert_close(lse, torch.tensor([0.0, -torch.inf, math.log(2)]))


def test_dispatch_keeps_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    outs, lses = torch.ones(2, 3, 8, dtype=torch.float16), torch.zeros(2, 3)
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        assert torch.equal(merge_lse(outs, lses).out, outs[0])
