"""Attention received, in Triton's interpreter against its oracle, and the oracle against a whole map."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmserve.kernels.saliency import naive, saliency, triton
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SMALL = triton.Config(block=16)


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-2, 2)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 4 - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "heads", "d"), [([1], 1, 8), ([17, 0, 33, 16], 2, 24), ([40, 3], 1, 72)])
def test_kernel_equals_oracle(
    sizes: list[int], heads: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    q, k = (uniform(sum(sizes), heads, d, seed=seed).to(dtype) for seed in (0, 1))
    begins = torch.tensor([0, *sizes]).cumsum(0).int()
    expected = naive.saliency(q, k, begins, scale=d**-0.5)
    found = triton.saliency(q, k, begins, scale=d**-0.5, max_tokens=max(sizes), config=SMALL)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=TOLERANCE[dtype])
    for first, last in pairwise(begins.tolist()):
        assert last == first or abs(float(found[first:last].sum()) - 1) < 1e-3


def test_oracle_is_the_mean_of_the_map() -> None:
    q, k = uniform(12, 2, 8, seed=2), uniform(12, 2, 8, seed=3)
    maps = torch.softmax(q.transpose(0, 1) @ k.permute(1, 2, 0) * 0.4, -1)
    found = naive.saliency(q, k, torch.tensor([0, 12], dtype=torch.int32), scale=0.4)
    torch.testing.assert_close(found, maps.mean((0, 1)))


def test_parts_of_a_fused_projection_need_no_copy() -> None:
    fused = uniform(20, 3, 2, 16, seed=4)
    q, k = fused[:, 0], fused[:, 1]
    begins = torch.tensor([0, 20], dtype=torch.int32)
    found = triton.saliency(q, k, begins, scale=0.3, max_tokens=20, config=SMALL)
    torch.testing.assert_close(found, naive.saliency(q, k, begins, scale=0.3), atol=1e-6, rtol=0)


def test_large_scores_do_not_overflow() -> None:
    q, k = 300 * uniform(18, 1, 8, seed=5), 300 * uniform(18, 1, 8, seed=6)
    begins = torch.tensor([0, 18], dtype=torch.int32)
    found = triton.saliency(q, k, begins, scale=1.0, max_tokens=18, config=SMALL)
    torch.testing.assert_close(found, naive.saliency(q, k, begins, scale=1.0), atol=1e-6, rtol=0)


def test_dispatch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = uniform(9, 1, 8, seed=7).half(), uniform(9, 1, 8, seed=8).half()
    begins = torch.tensor([0, 4, 9], dtype=torch.int32)
    found = []
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        found.append(saliency(q, k, begins, scale=0.3, max_tokens=5))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
    nothing = torch.zeros(1, dtype=torch.int32)
    assert triton.saliency(q[:0], k[:0], nothing, scale=1.0, max_tokens=0).shape == (0,)
