"""KV policies: the shared contract over all of them, and SnapKV against a literal loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmserve.errors import BadRequest
from mmserve.kv.base import POLICIES, LayerView, load_policy
from mmserve.kv.snapkv import SnapKV

KV_HEADS, GROUP, WIDTH = 2, 3, 8


def view(budget: float, *, visual: int = 17, before: int = 3, after: int = 5, seed: int = 0) -> LayerView:
    """A prompt of text, visual slots and text; orders have gaps, as after encoder-side reduction."""
    generator = torch.Generator().manual_seed(seed)
    total = before + visual + after
    order = torch.arange(total) * 2 + 1
    mask = torch.zeros(total, dtype=torch.bool)
    mask[before : before + visual] = True
    return LayerView(
        layer=1,
        queries=torch.randn(after, KV_HEADS * GROUP, WIDTH, generator=generator),
        query_order=order[before + visual :],
        keys=torch.randn(KV_HEADS, total, WIDTH, generator=generator),
        values=torch.randn(KV_HEADS, total, WIDTH, generator=generator),
        visual=mask,
        order=order,
        budget=budget,
    )


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize(("budget", "expected"), [(0.29, 4), (0.01, 1), (1.0, 17), (12, 4), (5, 0), (99, 17)])
def test_budgets_are_kept_and_text_stays(name: str, budget: float, expected: int) -> None:
    what = view(budget)
    kept = load_policy(name).select(what)
    assert len(kept) == KV_HEADS
    text = set(np.flatnonzero(~what.visual.numpy()).tolist())
    for head in kept:
        assert head.dtype == np.int64
        assert (np.diff(head) > 0).all()
        assert text <= set(head.tolist())
        assert len(head) - len(text) == (17 if name == "none" else expected)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_selection_is_repeatable_and_declared(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert policy.acts_at == "prefill_end"
    first, second = policy.select(view(0.3)), policy.select(view(0.3))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_prompt_without_media_loses_nothing(name: str) -> None:
    assert [len(head) for head in load_policy(name).select(view(0.1, visual=0))] == [8, 8]


def test_random_differs_between_heads_layers_and_prompts() -> None:
    policy = load_policy("random")
    heads = policy.select(view(0.3))
    assert not np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0][:8], policy.select(view(0.3, before=4))[0][:8])


def literal_scores(what: LayerView, pool: int) -> list[list[float]]:
    """SnapKV as the paper writes it, one number at a time."""
    places = [i for i, is_visual in enumerate(what.visual.tolist()) if is_visual]
    result = []
    for kv_head in range(KV_HEADS):
        total = [0.0] * len(places)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            mean = [0.0] * len(places)
            for row, query in enumerate(what.queries[:, head].double()):
                weights = [
                    math.exp(float(query @ key) / math.sqrt(WIDTH)) if order <= what.query_order[row] else 0.0
                    for key, order in zip(what.keys[kv_head].double(), what.order.tolist(), strict=True)
                ]
                for i, place in enumerate(places):
                    mean[i] += weights[place] / sum(weights) / len(what.queries)
            half = pool // 2
            for i in range(len(places)):
                total[i] += sum(mean[max(i - half, 0) : i + half + 1]) / pool / GROUP
        result.append(total)
    return result


def test_snapkv_scores_equal_a_literal_loop() -> None:
    what = view(0.3)
    expected = torch.tensor(literal_scores(what, 5), dtype=torch.float32)
    torch.testing.assert_close(SnapKV().scores(what), expected, rtol=1e-5, atol=1e-7)
    kept = SnapKV().select(what)
    for head in range(KV_HEADS):
        best = sorted(range(17), key=lambda i: (-expected[head, i], i))[: what.visual_budget]
        assert kept[head].tolist() == sorted([0, 1, 2, *(3 + i for i in best), *range(20, 25)])


def test_snapkv_resolves_ties_to_the_lower_index() -> None:
    what = view(0.3)
    what.keys.zero_()
    # equal attention everywhere; the average over neighbours is smaller at both edges only
    assert SnapKV().select(what)[0].tolist() == [0, 1, 2, 5, 6, 7, 8, 9, *range(20, 25)]


def test_snapkv_uses_the_last_queries_of_a_long_question() -> None:
    what = view(0.3, after=9)
    short = view(0.3, after=9)
    narrow = LayerView(
        layer=1,
        queries=short.queries[-2:],
        query_order=short.query_order[-2:],
        keys=short.keys,
        values=short.values,
        visual=short.visual,
        order=short.order,
        budget=0.3,
    )
    assert torch.equal(SnapKV(window=2).scores(what), SnapKV().scores(narrow))


def test_snapkv_needs_text_after_the_last_image() -> None:
    with pytest.raises(BadRequest, match="text after"):
        load_policy("snapkv").select(view(0.3, after=0))


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match="none, random, snapkv, but got h3o"):
        load_policy("h3o")
