"""Token merging in Triton's interpreter against its oracles, and those against the pruning methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.kernels import token_merge
from mmserve.kernels.token_merge import naive, triton
from mmserve.pruning.density import merge_clusters
from mmserve.pruning.segmentation import run_lengths as host_run_lengths
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


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_clips(*shapes: tuple[int, int]) -> Tensor:
    """Clips of (frames, tokens of a frame), one after another."""
    firsts = np.cumsum([0, *(frames * width for frames, width in shapes)])
    return torch.tensor([(int(at), *shape) for at, shape in zip(firsts[:-1], shapes, strict=True)]).int()


def make_begins(*sizes: int) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 200])
def test_cosines_equal_oracle(d: int, dtype: torch.dtype) -> None:
    clips = make_clips((3, 7), (1, 5), (2, 20))
    x = normal(66, d, seed=0).to(dtype)
    x[0] = 0
    expected = naive.frame_cosine(x, clips)
    found = triton.frame_cosine(x, clips, max_tokens=40)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[14:26].eq(-torch.inf).all(), "last frames have no next one"


def test_runs_equal_oracle_and_the_host() -> None:
    clips = make_clips((6, 5), (1, 3), (2, 150), (4, 1))
    cosine = normal(337, seed=1)
    expected = naive.run_lengths(cosine, clips, tau=-0.5)
    found = triton.run_lengths(cosine, clips, tau=-0.5, max_width=150)
    assert torch.equal(found, expected)
    links = (cosine[:25].view(5, 5) > -0.5).numpy()
    assert np.array_equal(found[:30].view(6, 5).numpy(), host_run_lengths(links))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_equal_oracle(dtype: torch.dtype) -> None:
    begins, counts = make_begins(5, 0, 1, 35), torch.tensor([2, 0, 1, 9], dtype=torch.int32)
    # far from the origin, where distances lose most
    x = (normal(41, 40, seed=2) + 8 * normal(40, seed=3)).to(dtype)
    expected = naive.cluster_tokens(x, begins, counts, neighbours=4)
    found = triton.cluster_tokens(x, begins, counts, neighbours=4, max_size=35)
    assert torch.equal(found.rank, expected.rank)
    assert torch.equal(found.cluster, expected.cluster)


def test_equal_tokens_are_decided_by_index() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 4.0], [3.0, 0.0]])
    begins, counts = make_begins(6), torch.tensor([3], dtype=torch.int32)
    expected = naive.cluster_tokens(x, begins, counts, neighbours=7)
    found = triton.cluster_tokens(x, begins, counts, neighbours=7, max_size=6)
    assert torch.equal(found.rank, expected.rank)
    assert torch.equal(found.cluster, expected.cluster)
    assert found.cluster[2] == found.cluster[5], "equally near to the same centre"
    same = triton.cluster_tokens(torch.ones(4, 8), make_begins(4), counts - 1, neighbours=2, max_size=4)
    assert same.rank.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_equals_oracle(dtype: torch.dtype) -> None:
    begins, counts = make_begins(19, 0, 40, 2), torch.tensor([17, 0, 3, 1], dtype=torch.int32)
    x, weights = normal(61, 24, seed=4).to(dtype), 1 + normal(61, seed=5).abs()
    clusters = naive.cluster_tokens(x, begins, counts, neighbours=3)
    expected_shares = naive.merge_weights(clusters, begins, weights, beta=0.6)
    shares = triton.merge_weights(clusters, begins, weights, beta=0.6, max_size=40)
    torch.testing.assert_close(shares, expected_shares)
    expected = naive.scatter_merge(x, begins, clusters.cluster, shares, max_count=17)
    found = triton.scatter_merge(x, begins, clusters.cluster, shares, max_count=17)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert found[1].eq(0).all()
    assert found[2, 3:].eq(0).all(), "no cluster is there"


def test_shares_of_a_cluster_sum_to_one() -> None:
    begins, counts = make_begins(30), torch.tensor([6], dtype=torch.int32)
    clusters = naive.cluster_tokens(normal(30, 8, seed=6), begins, counts, neighbours=7)
    shares = naive.merge_weights(clusters, begins, torch.ones(30), beta=0.6)
    sums = torch.zeros(6).index_add_(0, clusters.cluster.long(), shares)
    torch.testing.assert_close(sums, torch.ones(6))


def test_oracle_equals_the_pruning_method() -> None:
    sizes, counts = [12, 20], [3, 7]
    x = normal(32, 16, seed=7)
    begins, limits = make_begins(*sizes), torch.tensor(counts, dtype=torch.int32)
    clusters = naive.cluster_tokens(x, begins, limits, neighbours=5)
    shares = naive.merge_weights(clusters, begins, torch.ones(32), beta=0.6)
    merged = naive.scatter_merge(x, begins, clusters.cluster, shares, max_count=7)
    padded = torch.zeros(2, 20, 16)
    padded[0, :12], padded[1] = x[:12], x[12:]
    expected = merge_clusters(padded, np.array(sizes), np.array(counts), neighbours=5, beta=0.6)
    for group, count in enumerate(counts):
        rank = clusters.rank[begins[group] : begins[group + 1]]
        assert torch.equal(rank.argsort()[:count], expected.centre[group, :count])
        torch.testing.assert_close(merged[group, :count], expected.merged[group, :count])


def test_a_segment_is_averaged_over_time() -> None:
    x = normal(12, 8, seed=8)
    positions = torch.arange(12, dtype=torch.int32) % 4
    begins, shares = make_begins(12), torch.full((12,), 1 / 3)
    found = triton.scatter_merge(x, begins, positions, shares, max_count=4)
    torch.testing.assert_close(found[0], x.view(3, 4, 8).mean(0))


def test_dispatch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, clips, begins = normal(12, 8, seed=9).half(), make_clips((3, 4)), make_begins(12)
    counts, found = torch.tensor([2], dtype=torch.int32), []
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        cosine = token_merge.frame_cosine(x, clips, max_tokens=12)
        runs = token_merge.run_lengths(cosine, clips, tau=0.0, max_width=4)
        clusters = token_merge.cluster_tokens(x, begins, counts, neighbours=3, max_size=12)
        shares = token_merge.merge_weights(clusters, begins, torch.ones(12), beta=0.5, max_size=12)
        merged = token_merge.scatter_merge(x, begins, clusters.cluster, shares, max_count=2)
        assert merged.dtype == torch.float16
        found.append([cosine, runs, *clusters, shares, merged])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_nothing_is_no_launch() -> None:
    none, begins = torch.zeros(0, 8), torch.zeros(1, dtype=torch.int32)
    clusters = triton.cluster_tokens(none, begins, begins[:0], neighbours=1, max_size=0)
    assert clusters.rank.shape == (0,)
    assert triton.merge_weights(clusters, begins, none[:, 0], beta=0.5, max_size=0).shape == (0,)
    assert triton.scatter_merge(none, begins, clusters.cluster, none[:, 0], max_count=3).shape == (0, 3, 8)
    assert triton.frame_cosine(none, torch.zeros(0, 3).int(), max_tokens=0).shape == (0,)
