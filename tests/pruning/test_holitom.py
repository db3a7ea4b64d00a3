"""HoliTom against a literal implementation in loops, and the properties a server relies on."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.pruning.base import VisualItem
from mmserve.pruning.density import merge_clusters
from mmserve.pruning.holitom import HoliTom
from tests.pruning.clips import Row, assert_identical, assert_same, clip, density_clusters


def literal(item: VisualItem, keep: float, tau: float, beta: float, neighbours: int) -> list[Row]:
    """One window as the paper and the exact-count rule describe it, without regard to speed."""
    x, a = item.embeddings, item.saliency
    T, N, _ = x.shape
    budget = max(1, math.floor(Fraction(str(keep)) * T * N))

    def cosine(t: int, n: int) -> float:
        return float(torch.dot(x[t, n] / x[t, n].norm(), x[t + 1, n] / x[t + 1, n].norm()))

    def static(i: int, j: int) -> list[int]:
        return [n for n in range(N) if i < j and all(cosine(t, n) > tau for t in range(i, j))]

    P = {(i, j): (j - i) * len(static(i, j)) for i in range(T) for j in range(i, T)}
    spans = segment(P, T, T)
    if len(spans) > budget:
        spans = segment(P, T, budget)
    distinct = T * N - sum(P[span] for span in spans)
    if budget >= distinct:
        links = [(-cosine(t, n), t, n) for i, j in spans for t in range(i, j) for n in static(i, j)]
        joined = {(t, n) for _, t, n in sorted(links)[: T * N - budget]}
        return join_runs(x, joined)

    groups: list[tuple[tuple[int, int], int | None, list[int]]] = []  # span, frame, tokens
    for i, j in spans:
        fixed = static(i, j)
        groups.append(((i, j), None, fixed))
        groups += [((i, j), t, [n for n in range(N) if n not in fixed]) for t in range(i, j + 1)]
    shares = [Fraction(len(tokens) * budget, distinct) for _, _, tokens in groups]
    quotas = [math.floor(share) for share in shares]
    settled = set()
    for span in spans:
        members = [g for g, group in enumerate(groups) if group[0] == span]
        if sum(quotas[g] for g in members) == 0:
            winner = max(members, key=lambda g: (shares[g], -g))
            quotas[winner] += 1
            settled.add(winner)
    rest = sorted(
        (g for g in range(len(groups)) if g not in settled), key=lambda g: (quotas[g] - shares[g], g)
    )
    for g in rest[: budget - sum(quotas)]:
        quotas[g] += 1

    rows: list[Row] = []
    for ((i, j), frame, tokens), quota in zip(groups, quotas, strict=True):
        if frame is None:
            means = {n: x[i : j + 1, n].mean(dim=0) for n in tokens}
            for n, merged, members_count in density_peaks(means, quota, beta, neighbours):
                rows.append((i * N + n, merged, members_count * (j - i + 1)))
        else:
            best = sorted(tokens, key=lambda n: (-float(a[frame, n]), n))[:quota]
            rows += [(frame * N + n, x[frame, n], 1) for n in best]
    return sorted(rows, key=lambda row: row[0])


def segment(P: dict[tuple[int, int], int], T: int, limit: int) -> list[tuple[int, int]]:
    """Best cut of T frames into spans; with a limit that binds, over the number of spans too."""
    if limit >= T:
        gain, plans = [0], [[]]  # type: list[int], list[list[tuple[int, int]]]
        for e in range(T):
            best, span = gain[e], (e, e)
            for w in range(2, e + 2):
                if gain[e + 1 - w] + P[e + 1 - w, e] > best:
                    best, span = gain[e + 1 - w] + P[e + 1 - w, e], (e + 1 - w, e)
            gain.append(best)
            plans.append([*plans[span[0]], span])
        return plans[T]
    table: list[dict[int, tuple[int, list[tuple[int, int]]]]] = [{0: (0, [])}]
    for _ in range(limit):
        row: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        for e in range(T):
            for s in range(e, -1, -1):
                if s in table[-1]:
                    before, spans = table[-1][s]
                    if e + 1 not in row or before + P[s, e] > row[e + 1][0]:
                        row[e + 1] = (before + P[s, e], [*spans, (s, e)])
        table.append(row)
    return max((row[T] for row in table[1:] if T in row), key=lambda found: (found[0], len(found[1])))[1]


def join_runs(x: Tensor, joined: set[tuple[int, int]]) -> list[Row]:
    T, N, _ = x.shape
    rows: list[Row] = []
    for t in range(T):
        for n in range(N):
            if (t - 1, n) not in joined:
                end = t
                while (end, n) in joined:
                    end += 1
                rows.append((t * N + n, x[t : end + 1, n].mean(dim=0), end + 1 - t))
    return rows


def density_peaks(
    tokens: dict[int, Tensor], count: int, beta: float, neighbours: int
) -> list[tuple[int, Tensor, int]]:
    merged = []
    for c, others in density_clusters(tokens, count, neighbours).items():
        near = [tokens[p] for p in others]
        value = beta * tokens[c] + (1 - beta) * torch.stack(near).mean(dim=0) if near else tokens[c]
        merged.append((c, value, 1 + len(near)))
    return merged


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 24),
    keep=st.sampled_from([0.02, 0.05, 0.1, 0.15, 0.25, 0.4, 0.5, 0.7, 0.9, 1.0]),
    noise=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, noise: float
) -> None:
    item = clip(seed, frames, tokens, noise=noise)
    pruner = HoliTom(keep=keep)
    assert_same(pruner.reduce(item), literal(item, keep, pruner.threshold, pruner.beta, pruner.neighbours))


@given(frames=st.integers(1, 40), tokens=st.integers(1, 30), keep=st.floats(1e-4, 1), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_count_is_exact_per_window(frames: int, tokens: int, keep: float, seed: int) -> None:
    pruner = HoliTom(keep=keep, window_frames=16)
    sizes = [min(16, frames - start) * tokens for start in range(0, frames, 16)]
    expected = [max(1, math.floor(Fraction(str(keep)) * size)) for size in sizes]
    source = pruner.reduce(clip(seed, frames, tokens)).source
    assert pruner.plan(frames, tokens) == len(source) == sum(expected)
    assert torch.bincount(source // (16 * tokens), minlength=len(sizes)).tolist() == expected


def test_identical_frames_collapse_to_their_static_tokens() -> None:
    frame = clip(1, 1, 20).embeddings
    item = VisualItem(embeddings=frame.expand(8, -1, -1), saliency=torch.rand(8, 20))
    reduced = HoliTom(keep=20 / 160).reduce(item)
    assert reduced.source.tolist() == list(range(20))
    assert reduced.weight.tolist() == [8.0] * 20
    torch.testing.assert_close(reduced.embeddings, frame[0])
    clustered = HoliTom(keep=0.05).reduce(item)
    assert bool((clustered.source < 20).all())
    assert float(clustered.weight.sum()) == 160


def test_unrelated_frames_keep_the_most_salient_tokens_of_each() -> None:
    frames = torch.eye(8, dtype=torch.float32)[:, None, :].expand(8, 10, 8)
    saliency = torch.rand(8, 10, generator=torch.Generator().manual_seed(0))
    reduced = HoliTom(keep=0.3).reduce(VisualItem(embeddings=frames, saliency=saliency))
    expected = saliency.topk(3, dim=1).indices.sort(dim=1).values + 10 * torch.arange(8)[:, None]
    assert torch.equal(reduced.source, expected.flatten())
    assert bool((reduced.weight == 1).all())


def test_an_image_keeps_its_most_salient_tokens_as_they_are() -> None:
    item = clip(3, 1, 12)
    saliency = torch.tensor([[0, 5, 5, 1, 5, 2, 0, 9, 0, 5, 0, 0]], dtype=torch.float32)
    reduced = HoliTom(keep=0.25).reduce(
        VisualItem(embeddings=item.embeddings, saliency=saliency, modality="image")
    )
    assert reduced.source.tolist() == [1, 2, 7]
    assert torch.equal(reduced.embeddings, item.embeddings[0, [1, 2, 7]])


def test_keeping_all_is_the_identity() -> None:
    item = clip(4, 8, 10, noise=0.0)
    reduced = HoliTom(keep=1.0).reduce(item)
    assert torch.equal(reduced.embeddings, item.embeddings.flatten(0, 1))
    assert torch.equal(reduced.source, torch.arange(80))


def test_a_threshold_of_one_merges_nothing() -> None:
    frame = clip(5, 1, 10).embeddings
    item = VisualItem(embeddings=frame.expand(6, -1, -1), saliency=torch.rand(6, 10))
    for keep in (0.2, 0.5, 0.9):
        assert bool((HoliTom(keep=keep, tau=1.0).reduce(item).weight == 1).all())


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_features_stay_constant(keep: float, dtype: torch.dtype) -> None:
    constant = torch.randn(16, generator=torch.Generator().manual_seed(6)).to(dtype)
    item = VisualItem(embeddings=constant.expand(12, 15, 16), saliency=torch.rand(12, 15))
    reduced = HoliTom(keep=keep).reduce(item)
    assert reduced.embeddings.dtype == dtype
    torch.testing.assert_close(reduced.embeddings, constant.expand(len(reduced.source), 16))


def test_a_bound_on_segments_still_gives_the_exact_count() -> None:
    # unrelated frames of two tokens, and room for only three tokens
    item = VisualItem(embeddings=torch.eye(16)[:, None, :].expand(16, 2, 16), saliency=torch.rand(16, 2))
    assert len(HoliTom(keep=0.1).reduce(item).source) == 3


def test_result_does_not_depend_on_what_was_reduced_before() -> None:
    items = [clip(seed, frames, tokens) for seed, frames, tokens in ((7, 12, 20), (8, 3, 7), (9, 1, 30))]
    pruner = HoliTom(keep=0.2)
    together = [pruner.reduce(item) for item in items]
    for item, first in zip(items, together, strict=True):
        assert_identical(HoliTom(keep=0.2).reduce(item), first)


def test_windows_are_reduced_independently() -> None:
    item = clip(10, 20, 12)
    whole = HoliTom(keep=0.25, window_frames=8).reduce(item)
    at = 0
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        part = HoliTom(keep=0.25, window_frames=0).reduce(
            VisualItem(embeddings=item.embeddings[start:stop], saliency=item.saliency[start:stop])
        )
        end = at + len(part.source)
        assert torch.equal(whole.embeddings[at:end], part.embeddings)
        assert torch.equal(whole.source[at:end], part.source + start * 12)
        at = end
    assert at == len(whole.source)


def test_large_features_do_not_flatten_the_density() -> None:
    # exp(-distance^2) of either cluster underflows to 0; the tight one must still win
    tight = torch.tensor([[0.0], [1.0], [2.0]])
    spread = torch.tensor([[1e4], [1.2e4], [1.5e4]])
    tokens = torch.cat([spread, tight])[None] * 100
    clusters = merge_clusters(
        tokens, torch.tensor([6]).numpy(), torch.tensor([2]).numpy(), neighbours=3, beta=0.6
    )
    assert int(clusters.centre[0, 0]) in (3, 4, 5)
    assert float(clusters.members.sum()) == 6


def test_threshold_follows_the_paper() -> None:
    assert HoliTom(keep=0.25).threshold == 0.8
    assert HoliTom(keep=0.1).threshold == 0.65
    assert HoliTom(keep=0.1, tau=0.9).threshold == 0.9
