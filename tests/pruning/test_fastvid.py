"""FastVID against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem, make_pruner
from mmserve.pruning.fastvid import FastVID
from tests.pruning.clips import Row, assert_same, clip, cosine, even, most_salient


def spans(x: Tensor, segments: int, tau: float) -> list[tuple[int, int]]:
    means = x.mean(dim=1)
    alike = {t: cosine(means[t], means[t + 1]) for t in range(len(x) - 1)}
    cuts = {t for t in alike if alike[t] < tau}
    cuts |= set(sorted(alike, key=lambda t: (alike[t], t))[: segments - 1])
    edges = [0, *(t + 1 for t in sorted(cuts)), len(x)]
    return list(pairwise(edges))


def peaks(tokens: dict[int, Tensor], count: int, neighbours: int) -> list[int]:
    """The `count` tokens of highest density times distance to a denser one."""
    k = min(neighbours, len(tokens))
    apart = {(p, q): float((tokens[p] - tokens[q]).square().mean()) for p in tokens for q in tokens}
    rho = {p: math.exp(-sum(sorted(apart[p, q] for q in tokens)[:k]) / k) for p in tokens}
    delta = {}
    for p in tokens:
        above = [apart[p, q] for q in tokens if rho[q] > rho[p] or (rho[q] == rho[p] and q < p)]
        delta[p] = math.sqrt(min(above) if above else max(apart.values()))
    return sorted(tokens, key=lambda p: (-rho[p] * delta[p], p))[:count]


def literal(item: VisualItem, pruner: FastVID) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    quotas = even(T, max(1, math.floor(Fraction(str(pruner.keep)) * T * N)))
    context = [math.floor(Fraction(str(pruner.context)) * quota) for quota in quotas]
    salient = {t: most_salient(item, t, range(N), quotas[t] - context[t]) for t in range(T)}
    rows: list[Row] = [(t * N + n, x[t, n], 1) for t in range(T) for n in salient[t]]
    for start, stop in spans(x, pruner.segments, pruner.tau):
        rest = {t: [n for n in range(N) if n not in salient[t]] for t in range(start, stop)}
        for stride in range(pruner.stride, 0, -1):
            frames = sorted(range(stop - 1, start - 1, -stride))
            shares = dict(zip(frames, even(len(frames), sum(context[start:stop])), strict=True))
            if all(shares[t] <= len(rest[t]) for t in frames):
                break
        anchors = {
            t: peaks({n: x[t, n] for n in rest[t]}, share, pruner.neighbours)
            for t, share in shares.items()
            if share
        }
        loose = [(t, n) for t in rest for n in rest[t] if n not in anchors.get(t, [])]
        for t, own in anchors.items():
            members: dict[int, list[tuple[int, int]]] = {n: [] for n in own}
            for cell in loose:
                likes = {n: cosine(x[cell], x[t, n]) for n in own}
                members[max(own, key=lambda n: likes[n])].append(cell)
            for n, absorbed in members.items():
                w = max(1 / (len(absorbed) + 1), pruner.beta)
                value = x[t, n]
                if absorbed:
                    value = w * value + (1 - w) * torch.stack([x[cell] for cell in absorbed]).mean(dim=0)
                rows.append((t * N + n, value, 1 + Fraction(len(absorbed), len(anchors))))
    return rows


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 10),
    tokens=st.integers(1, 16),
    keep=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.7, 0.9]),
    segments=st.sampled_from([1, 2, 8]),
    tau=st.sampled_from([-1.0, 0.5, 0.9]),
    context=st.sampled_from([0.0, 0.4, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, segments: int, tau: float, context: float
) -> None:
    item = clip(seed, frames, tokens)
    pruner = FastVID(keep=keep, segments=segments, tau=tau, context=context)
    if pruner.plan(frames, tokens) < frames * tokens:
        assert_same(pruner.reduce(item), literal(item, pruner))


def test_every_fourth_frame_from_the_last_is_an_anchor() -> None:
    # one still scene of ten frames: of ten tokens in each, three are kept and two are merged
    scene = clip(1, 1, 10).embeddings
    item = VisualItem(embeddings=scene.expand(10, -1, -1), saliency=torch.zeros(10, 10))
    reduced = FastVID(keep=0.5, segments=1).reduce(item)
    counts = torch.bincount(reduced.source // 10, minlength=10)
    assert counts.tolist() == [3, 10, 3, 3, 3, 9, 3, 3, 3, 10]
    assert float(reduced.weight.sum()) == pytest.approx(100)


def test_an_anchor_keeps_its_least_share() -> None:
    # the last token is alone, the first two are close; the most salient one is no part of this
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    item = VisualItem(embeddings=x, saliency=torch.tensor([[1.0, 0, 0, 0]]), modality="image")
    reduced = FastVID(keep=0.5, context=0.5).reduce(item)
    assert reduced.source.tolist() == [0, 1]
    assert reduced.weight.tolist() == [1, 3]
    torch.testing.assert_close(reduced.embeddings, x[0, :2])


@pytest.mark.parametrize("setting", ["segments", "stride", "neighbours"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(BadRequest, match=f"Expected {setting} to be a whole number from 1 to"):
        make_pruner("fastvid", 0.5, **{setting: 0})
