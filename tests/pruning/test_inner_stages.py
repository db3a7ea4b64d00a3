"""The inner stages of PruneVID, FlashVID and FrameFusion, each against a literal form of its paper."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmserve.pruning.base import exact_count
from mmserve.pruning.framefusion_m import merge
from mmserve.pruning.inner import InnerView, make_reducer
from tests.pruning.clips import cosine
from tests.pruning.test_inner import GROUP, HIDDEN, WIDTH, literal_attention, make_view


def literal_heads(view: InnerView) -> list[list[list[float]]]:
    """Softmax by head, row and key, of the rows that are in view."""
    assert view.queries is not None
    assert view.keys is not None
    older, found = view.keys.shape[1] - len(view.hidden), []
    for head in range(view.queries.shape[1]):
        rows = []
        for index, query in enumerate(view.queries[:, head]):
            seen = view.keys.shape[1] - len(view.queries) + index + 1
            scores = [float(query @ key) / math.sqrt(WIDTH) for key in view.keys[head // GROUP, :seen]]
            weights = [math.exp(score - max(scores)) for score in scores]
            paid = [weight / sum(weights) for weight in weights] + [0.0] * (view.keys.shape[1] - seen)
            rows.append(paid[older:])
        found.append(rows)
    return found


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:count])


def test_prunevid_keeps_what_any_head_of_any_word_looks_at() -> None:
    view = make_view(20, seed=2)
    heads = literal_heads(view)
    highest = [max(paid[row] for head in heads for paid in head) for row in range(20)]
    found = make_reducer("prunevid_m").reduce(view)
    assert found.rows.tolist() == [*best(highest, 8), *range(20, 26)]
    assert torch.equal(found.hidden, view.hidden[found.rows])
    mean = [sum(paid[row] for head in heads for paid in head) for row in range(20)]
    assert best(mean, 8) != best(highest, 8), "it matters here"


def test_flashvid_keeps_what_the_last_row_looks_at() -> None:
    view = make_view(20, seed=3)
    paid = literal_attention(view)[-1, :20].tolist()
    found = make_reducer("flashvid_m").reduce(view)
    assert found.rows.tolist() == [*best(paid, 6), *range(20, 26)]
    assert torch.equal(found.hidden, view.hidden[found.rows])


# FrameFusion

PLACES = 5


def clip_view(frames: int, *, seed: int = 0, noise: float = 0.5) -> InnerView:
    """Frames of `PLACES` tokens that are alike where nothing moves, some tokens being gone already."""
    rng = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, PLACES, HIDDEN, generator=rng)
    busy = 0.3 + torch.rand(1, PLACES, 1, generator=rng)
    tokens = scene + noise * busy * torch.randn(frames, PLACES, HIDDEN, generator=rng)
    there = (torch.rand(frames * PLACES, generator=rng) > 0.15).nonzero().flatten()
    plain = make_view(len(there), seed=seed)
    hidden, patch = plain.hidden.clone(), torch.full((len(plain.hidden),), 99)
    hidden[: len(there)], patch[: len(there)] = tokens.flatten(0, 1)[there], there % PLACES
    return dataclasses.replace(plain, hidden=hidden, patch=patch, stages=4)


def literal_merge(view: InnerView, similarity: float, most: int) -> dict[int, tuple[Tensor, int]]:
    """Rows of runs' first tokens with the mean and the length of each run."""
    chains: dict[int, list[int]] = {}
    for row in view.is_reducible.nonzero().flatten().tolist():
        chains.setdefault(int(view.patch[row]), []).append(row)
    pairs = [
        (cosine(view.hidden[a], view.hidden[b]), place, a, b)
        for place, chain in sorted(chains.items())
        for a, b in pairwise(chain)
    ]
    likely = sorted((pair for pair in pairs if pair[0] >= similarity), key=lambda pair: -pair[0])
    joined = {b for _, _, _, b in likely[:most]}
    runs: list[list[int]] = []
    for _, chain in sorted(chains.items()):
        for row in chain:
            if row in joined:
                runs[-1].append(row)
            else:
                runs.append([row])
    return {run[0]: (view.hidden[run].double().mean(0).float(), len(run)) for run in runs}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [3, 1000])
def test_runs_of_a_place_become_their_mean(seed: int, most: int) -> None:
    view = clip_view(9, seed=seed)
    rows, hidden = merge(view, 0.6, most)
    expected = literal_merge(view, 0.6, most)
    visual = int(view.is_reducible.sum())
    assert max(length for _, length in expected.values()) > 1
    assert rows.tolist() == [*sorted(expected), *range(visual, len(view.hidden))]
    for row, value in zip(rows.tolist(), hidden, strict=True):
        if row < visual:
            mean, length = expected[row]
            torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)
            assert length > 1 or torch.equal(value, view.hidden[row])
        else:
            assert torch.equal(value, view.hidden[row])


def test_merging_goes_on_until_little_is_alike_and_then_the_best_stay() -> None:
    view = clip_view(12, noise=0.8)
    visual = int(view.is_reducible.sum())
    method, count = make_reducer("framefusion_m", 0.1), exact_count(0.1, visual)
    first = method.reduce(view)
    assert first.memory is None, "much was alike"
    assert count < len(first.rows) - (len(view.hidden) - visual) < visual * 0.9
    left = dataclasses.replace(
        make_view(int((first.rows < visual).sum())), patch=view.patch[first.rows], entered=visual, stages=4
    )
    # nothing is alike in these
    left = dataclasses.replace(left, stage=1)
    second = method.reduce(left)
    assert second.memory is not None
    third = method.reduce(dataclasses.replace(left, stage=2, memory=second.memory))
    scores = literal_attention(left).mean(0)[: int(left.is_reducible.sum())].tolist()
    assert third.rows.tolist()[:count] == best(scores, count)
    last = method.reduce(dataclasses.replace(left, stage=3))
    assert last.rows.tolist() == third.rows.tolist(), "the last layer prunes whatever was merged before"


def test_no_more_is_merged_than_is_to_go() -> None:
    view = clip_view(12, noise=0.0)
    visual = int(view.is_reducible.sum())
    found = make_reducer("framefusion_m", 0.5).reduce(view)
    assert int(view.is_reducible[found.rows].sum()) == exact_count(0.5, visual)
