"""Norms, rotations and page writes in Triton's interpreter against their oracles, those against a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmserve.kernels import norm_rope
from mmserve.kernels.norm_rope import naive, triton
from mmserve.models.rope import rope_angles, rope_frequencies, rotate
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_slots(kv_heads: int, tokens: int, page_size: int) -> tuple[Tensor, int]:
    """Slots of each KV head in random order, one of them skipped, and the number of pages."""
    pages = -(-kv_heads * tokens // page_size) + 2
    order = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(1))
    slots = order[: kv_heads * tokens].view(kv_heads, tokens).clone()
    slots[0, tokens // 2] = -1
    return slots, pages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 72), (2, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_equals_oracle(dtype: torch.dtype, rows: int, width: int, with_residual: bool) -> None:
    x, residual = (3 * uniform(rows, width, seed=seed).to(dtype) for seed in (0, 1))
    weight = uniform(width, seed=2).to(dtype)
    added = residual if with_residual else None
    expected, expected_total = naive.rms_norm(x, weight, eps=1e-5, residual=added)
    found, total = triton.rms_norm(x, weight, eps=1e-5, residual=added)
    assert found.dtype == dtype
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "tokens", "group", "kv_heads", "d", "page_size", "axes", "normed"),
    [
        (torch.float32, 1, 1, 1, 8, 4, 1, False),
        (torch.float32, 5, 4, 2, 24, 8, 3, True),
        (torch.float16, 3, 7, 2, 64, 16, 1, True),
        (torch.float16, 4, 7, 1, 80, 3, 3, False),
        (torch.bfloat16, 3, 4, 2, 136, 32, 3, True),
    ],
)
def test_rope_and_append_equal_oracle(
    dtype: torch.dtype,
    tokens: int,
    group: int,
    kv_heads: int,
    d: int,
    page_size: int,
    axes: int,
    normed: bool,
) -> None:
    qkv = uniform(tokens, (group + 2) * kv_heads, d, seed=0).to(dtype)
    frequencies = rope_frequencies(d, 1e4)
    generator = torch.Generator().manual_seed(2)
    shape = (tokens,) if axes == 1 else (tokens, axes)
    positions = torch.randint(0, 5000, shape, generator=generator, dtype=torch.int32)
    slots, pages = make_slots(kv_heads, tokens, page_size)
    weights = [(1 + uniform(d, seed=seed)).to(dtype) if normed else None for seed in (3, 4)]
    chosen: dict[str, Any] = {
        "eps": 1e-5,
        "axis_of_pair": torch.arange(d // 2, dtype=torch.int32) % 3 if axes == 3 else None,
        "q_weight": weights[0],
        "k_weight": weights[1],
    }
    expected_kv, found_kv = (
        [torch.full((pages, page_size, d), 9.0).to(dtype) for _ in range(2)] for _ in range(2)
    )
    expected = naive.rope_append(qkv, positions, frequencies, slots, expected_kv[0], expected_kv[1], **chosen)
    found = triton.rope_append(qkv, positions, frequencies, slots, found_kv[0], found_kv[1], **chosen)
    tolerance: dict[str, Any] = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, **tolerance)
    torch.testing.assert_close(found_kv[0], expected_kv[0], **tolerance)
    assert torch.equal(found_kv[1], expected_kv[1]), "values are copied"


def test_oracle_equals_the_decoder() -> None:
    qkv = uniform(5, 4, 16, seed=0)
    positions = torch.tensor([0, 3, 90, 4096, 131071], dtype=torch.int32)
    frequencies = rope_frequencies(16, 1e6)
    cos, sin = rope_angles(positions, frequencies, torch.float32)
    slots = torch.arange(5)[None]
    k_pages, v_pages = torch.zeros(5, 1, 16), torch.zeros(5, 1, 16)
    q = naive.rope_append(qkv, positions, frequencies, slots, k_pages, v_pages)
    torch.testing.assert_close(q, rotate(qkv[:, :2], cos, sin))
    torch.testing.assert_close(k_pages, rotate(qkv[:, 2:3], cos, sin))
    assert torch.equal(v_pages, qkv[:, 3:])


def test_axes_equal_those_of_the_models() -> None:
    assert naive.axes_of_pairs([2, 3, 3], interleaved=False).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    # transformers, Qwen3-VL: start from the first axis, put axis i at slice(i, 3 * section[i], 3)
    expected = torch.zeros(64, dtype=torch.int32)
    for axis in (1, 2):
        expected[axis : 20 * 3 : 3] = axis
    assert torch.equal(naive.axes_of_pairs([24, 20, 20], interleaved=True), expected)


def test_large_angles_keep_their_place() -> None:
    positions = torch.tensor([1, 1_048_575, 2_000_003], dtype=torch.int32)
    frequencies = torch.tensor([1.0, 0.7, 0.01, 1e-5])
    qkv = torch.ones(3, 3, 8)
    pages = torch.zeros(3, 1, 8)
    slots = torch.arange(3)[None]
    expected = naive.rope_append(qkv, positions, frequencies, slots, pages, pages.clone())
    found = triton.rope_append(qkv, positions, frequencies, slots, pages, pages.clone())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("moves", "d"), [(1, 8), (19, 24), (16, 128)])
def test_rerotate_equals_oracle(dtype: torch.dtype, moves: int, d: int) -> None:
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    slots = (pages[:, None] * 4 + torch.arange(4)).flatten()
    source, destination = slots[:moves], slots[24 : 24 + moves]
    delta = torch.arange(moves, dtype=torch.int32) * 977 - 5000
    frequencies = rope_frequencies(d, 1e4)
    k, v = (uniform(12, 4, d, seed=seed).to(dtype) for seed in (4, 5))
    expected_k, expected_v = k.clone(), v.clone()
    naive.rerotate(expected_k, expected_v, source, destination, delta, frequencies)
    triton.rerotate(k, v, source, destination, delta, frequencies)
    torch.testing.assert_close(k, expected_k, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(v, expected_v)


def test_turned_keys_equal_keys_at_the_other_position() -> None:
    d, frequencies = 16, rope_frequencies(16, 1e4)
    qkv = uniform(6, 3, d, seed=6)
    old, new = torch.arange(6, dtype=torch.int32) * 7, torch.arange(6, dtype=torch.int32)
    slots = torch.arange(6)[None]
    pages = [torch.zeros(12, 1, d) for _ in range(4)]
    triton.rope_append(qkv, old, frequencies, slots, pages[0], pages[1])
    triton.rerotate(pages[0], pages[1], slots[0], slots[0] + 6, new - old, frequencies)
    triton.rope_append(qkv, new, frequencies, slots + 6, pages[2], pages[3])
    torch.testing.assert_close(pages[0][6:], pages[2][6:], atol=1e-5, rtol=0)
    assert torch.equal(pages[1][6:], pages[3][6:])


def test_nothing_is_no_launch() -> None:
    x, pages = torch.zeros(0, 8), torch.ones(1, 1, 8)
    assert triton.rms_norm(x, torch.ones(8), eps=1e-5)[0].shape == (0, 8)
    none = torch.zeros(0, dtype=torch.int64)
    q = triton.rope_append(
        torch.zeros(0, 4, 8), none.int(), torch.ones(4), none.view(1, 0), pages, pages.clone()
    )
    assert q.shape == (0, 2, 8)
    triton.rerotate(pages, pages.clone(), none, none, none.int(), torch.ones(4))
    assert pages.eq(1).all()


def test_dispatch_keeps_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    x = uniform(2, 4, 8, seed=7).half()
    frequencies, slots = rope_frequencies(8, 1e4), torch.arange(2)[None]
    found = {}
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        pages = [torch.zeros(4, 1, 8, dtype=torch.float16) for _ in range(2)]
        normed, _ = norm_rope.rms_norm(x.view(2, 32), torch.ones(32).half(), eps=1e-5)
        q = norm_rope.rope_append(x, slots[0].int(), frequencies, slots, pages[0], pages[1])
        norm_rope.rerotate(pages[0], pages[1], slots[0], slots[0] + 2, slots[0].int(), frequencies)
        assert normed.dtype == q.dtype == torch.float16
        found[choice] = [normed, q, *pages]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
