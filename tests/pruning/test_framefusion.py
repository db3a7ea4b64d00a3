"""FrameFusion's merging against a literal implementation in loops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.framefusion import FrameFusion
from tests.pruning.clips import Row, assert_same, budget_of, clip, cosine


def literal(item: VisualItem, keep: float, similarity: float) -> list[Row]:
    x, a = item.embeddings, item.saliency
    T, N, _ = x.shape
    budget = budget_of(item, keep)
    links = [(-cosine(x[t - 1, n], x[t, n]), t, n) for t in range(1, T) for n in range(N)]
    links = sorted(link for link in links if -link[0] >= similarity)
    joined = {(t, n) for _, t, n in links[: T * N - budget]}
    runs = []
    for t in range(T):
        for n in range(N):
            if (t, n) not in joined:
                stop = t + 1
                while (stop, n) in joined:
                    stop += 1
                runs.append((-float(a[t:stop, n].mean()), t * N + n, x[t:stop, n].mean(dim=0), stop - t))
    best = sorted(runs, key=lambda run: run[:2])[:budget]
    return [(source, value, weight) for _, source, value, weight in best]


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 20),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    similarity=st.sampled_from([-1, 0.3, 0.6, 0.95, 1]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, similarity: float
) -> None:
    item = clip(seed, frames, tokens)
    # sums of eighths are exact
    item = VisualItem(embeddings=item.embeddings, saliency=(item.saliency * 8).round() / 8)
    assert_same(FrameFusion(keep=keep, similarity=similarity).reduce(item), literal(item, keep, similarity))


def test_a_clip_by_hand() -> None:
    # the first position stays, the second changes in the last frame
    x = torch.tensor([[[1.0, 0], [0, 1]], [[3, 0], [0, 2]], [[2, 0], [1, 0]]])
    item = VisualItem(embeddings=x, saliency=torch.tensor([[1.0, 5], [1, 5], [1, 2]]))
    reduced = FrameFusion(keep=0.5).reduce(item)
    assert reduced.source.tolist() == [0, 1, 5]
    assert reduced.weight.tolist() == [3, 2, 1]
    assert reduced.embeddings.tolist() == [[2, 0], [0, 1.5], [1, 0]]
    # all alike is merged before anything is dropped, and then the least salient goes
    assert FrameFusion(keep=0.34).reduce(item).source.tolist() == [1, 5]
    # only as much is merged as the budget asks for, the first of equally good links
    assert FrameFusion(keep=0.84).reduce(item).weight.tolist() == [2, 1, 1, 1, 1]
