"""VidCom2 against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem, make_pruner
from mmserve.pruning.quotas import weighted_quotas
from mmserve.pruning.vidcom2 import VidCom2
from tests.pruning.clips import Row, assert_same, clip


def gaussians(token: Tensor, centre: Tensor) -> float:
    squared = float((token - centre).square().sum())
    return sum(math.exp(-squared / (2 * 2.0**k)) for k in range(-3, 2))


def shares(weights: list[float], size: int, budget: int) -> list[int]:
    """Proportional shares, full groups set aside one by one, then remainders by largest fraction."""
    full: set[int] = set()
    while True:
        rest = [g for g in range(len(weights)) if g not in full]
        total = sum(weights[g] for g in rest)
        real = {g: (budget - size * len(full)) * weights[g] / total for g in rest}
        over = [g for g in rest if real[g] > size]
        if not over:
            break
        full.add(max(over, key=lambda g: real[g]))
    quotas = [size if g in full else math.floor(real[g]) for g in range(len(weights))]
    order = sorted((g for g in rest if quotas[g] < size), key=lambda g: (quotas[g] - real[g], g))
    for g in order[: budget - sum(quotas)]:
        quotas[g] += 1
    return quotas


def literal(item: VisualItem, keep: float, channels: float, temperature: float) -> list[Row]:
    x = item.embeddings
    T, N, D = x.shape
    flat = x.reshape(-1, D)
    variance = [float((flat[:, d] - flat[:, d].mean()).square().mean()) for d in range(D)]
    stable = sorted(sorted(range(D), key=lambda d: variance[d])[: max(1, math.floor(channels * D))])
    unit = x[..., stable] / x[..., stable].norm(dim=2, keepdim=True)
    clip_centre = unit.reshape(-1, len(stable)).mean(dim=0)
    to_clip = [[gaussians(unit[t, n], clip_centre) for n in range(N)] for t in range(T)]
    to_frame = [[gaussians(unit[t, n], unit[t].mean(dim=0)) for n in range(N)] for t in range(T)]
    mean = [sum(row) / N for row in to_clip]
    powers = [math.exp((min(mean) - value) / temperature) for value in mean]
    softmax = [power / sum(powers) for power in powers]
    weights = [1 + share - sum(softmax) / T for share in softmax]
    rows: list[Row] = []
    budget = max(1, math.floor(Fraction(str(keep)) * T * N))
    for t, quota in enumerate(shares(weights, N, budget)):
        best = sorted(range(N), key=lambda n: (to_clip[t][n] + to_frame[t][n], n))[:quota]
        rows += [(t * N + n, x[t, n], 1) for n in best]
    return rows


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 8),
    tokens=st.integers(1, 16),
    keep=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.7, 0.9]),
    channels=st.sampled_from([0.5, 1.0]),
    temperature=st.sampled_from([0.01, 1.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, channels: float, temperature: float
) -> None:
    item = clip(seed, frames, tokens)
    pruner = VidCom2(keep=keep, channels=channels, temperature=temperature)
    assert_same(pruner.reduce(item), literal(item, keep, channels, temperature))


def test_the_frame_that_stands_out_gets_the_most() -> None:
    frames = torch.tensor([1.0, 0.0, 0.0]).expand(8, 20, 3).clone()
    frames[5] = torch.tensor([0.0, 1.0, 0.0])
    item = VisualItem(embeddings=frames, saliency=torch.zeros(8, 20))
    counts = torch.bincount(VidCom2(keep=0.4, channels=1.0).reduce(item).source // 20, minlength=8)
    # 8 a frame, times 1 - 1/8 for the seven that are alike and 2 - 1/8 for the other
    assert counts.tolist() == [7, 7, 7, 7, 7, 15, 7, 7]


def test_channels_that_vary_are_not_compared() -> None:
    x = torch.zeros(1, 4, 4)
    x[..., 0] = torch.tensor([9.0, -9.0, 9.0, -9.0])
    x[..., 1] = torch.tensor([5.0, 5.0, -5.0, -5.0])
    x[..., 2] = 1
    x[..., 3] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    item = VisualItem(embeddings=x, saliency=torch.zeros(1, 4), modality="image")
    assert VidCom2(keep=0.25).reduce(item).source.tolist() == [3]


@pytest.mark.parametrize(
    ("weights", "size", "budget", "expected"),
    [
        ([1, 1, 1], 5, 4, [2, 1, 1]),
        ([1, 9], 5, 8, [3, 5]),
        ([1, 8, 9], 4, 9, [1, 4, 4]),
        ([1, 2, 3], 2, 6, [2, 2, 2]),
        ([2, 1], 9, 0, [0, 0]),
    ],
)
def test_weighted_quotas_are_proportional_and_capped(
    weights: list[float], size: int, budget: int, expected: list[int]
) -> None:
    assert weighted_quotas(np.array(weights, dtype=np.float64), size, budget).tolist() == expected


def test_settings_are_checked() -> None:
    with pytest.raises(BadRequest, match="Expected channels above 0 to 1, but got 0"):
        make_pruner("vidcom2", 0.5, channels=0)
    with pytest.raises(BadRequest, match=r"Expected temperature from 0\.0001 to 10000, but got 0"):
        make_pruner("vidcom2", 0.5, temperature=0)
