"""What every method inside the language model promises, and each against a literal form of its paper."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmserve.errors import BadRequest
from mmserve.methods import WITH_WEIGHTS
from mmserve.pruning.base import exact_count
from mmserve.pruning.cdpruner import most_diverse, relevance
from mmserve.pruning.holitom_m import merge_into
from mmserve.pruning.inner import REDUCERS, InnerReducer, InnerView, Survivors, load_reducer, make_reducer
from mmserve.pruning.sparsevlm import raters, recycled
from tests.pruning.predictors import HEADS, write_predictor

KV_HEADS, GROUP, WIDTH, HIDDEN = 2, 3, 8, 12
every_method = pytest.mark.parametrize("name", sorted(REDUCERS))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_predictor(tmp_path_factory.mktemp("weights") / "predictor.safetensors", HIDDEN)


def make(name: str, weights: str, keep: float | None = None) -> InnerReducer:
    """A method with what it cannot do without."""
    given = {"weights": weights, "heads": HEADS} if name in WITH_WEIGHTS else {}
    return make_reducer(name, keep, **given)


def make_view(
    visual: int, *, seed: int = 0, words: int = 5, before: int = 3, newline: bool = True
) -> InnerView:
    """An item, its newline and a question; `before` rows of text are out of sight."""
    rng = torch.Generator().manual_seed(seed)
    rows = visual + newline + words
    is_visual = torch.arange(rows) < visual + newline
    return InnerView(
        stage=0,
        stages=1,
        entered=visual,
        hidden=torch.randn(rows, HIDDEN, generator=rng),
        is_visual=is_visual,
        is_reducible=torch.arange(rows) < visual,
        patch=torch.arange(rows) % 4,
        queries=torch.randn(max(words, 1), KV_HEADS * GROUP, WIDTH, generator=rng),
        keys=torch.randn(KV_HEADS, before + rows, WIDTH, generator=rng),
    )


def through(method: InnerReducer, view: InnerView) -> list[Survivors]:
    """What every stage lets pass; attention is that of the surviving rows."""
    stages = len(method.layers(28))
    memory, passed = None, []
    for stage in range(stages):
        view = dataclasses.replace(view, stage=stage, stages=stages, memory=memory)
        found = method.reduce(view)
        passed.append(found)
        memory, rows = found.memory, found.rows
        assert view.keys is not None
        older = view.keys.shape[1] - len(view.hidden)
        view = dataclasses.replace(
            view,
            hidden=found.hidden,
            is_visual=view.is_visual[rows],
            is_reducible=view.is_reducible[rows],
            patch=view.patch[rows],
            keys=torch.cat([view.keys[:, :older], view.keys[:, older:][:, rows]], 1),
        )
    return passed


@every_method
@given(
    visual=st.integers(1, 60),
    words=st.integers(0, 9),
    keep=st.floats(1e-3, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_counts_are_exact_and_only_visual_rows_go(
    name: str, weights: str, visual: int, words: int, keep: float, seed: int
) -> None:
    method, view = make(name, weights, keep), make_view(visual, seed=seed, words=words)
    passed = through(method, view)
    rows = torch.arange(len(view.hidden))
    for found in passed:
        assert bool((found.rows.diff() > 0).all())
        rows = rows[found.rows]
        assert found.hidden.shape == (len(rows), HIDDEN)
    assert int(view.is_reducible[rows].sum()) == exact_count(keep, visual)
    others = (~view.is_reducible).nonzero().flatten()
    assert bool(torch.isin(others, rows).all())
    assert torch.equal(passed[-1].hidden[torch.isin(rows, others)], view.hidden[others])


@every_method
def test_to_keep_everything_changes_nothing(name: str, weights: str) -> None:
    view = make_view(17)
    for found in through(make(name, weights, 1.0), view):
        assert found.rows.tolist() == list(range(len(view.hidden)))
        assert torch.equal(found.hidden, view.hidden)


@every_method
def test_two_runs_give_the_same_bits(name: str, weights: str) -> None:
    first, second = (through(make(name, weights, 0.3), make_view(50, seed=4))[-1] for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.hidden, second.hidden)


@every_method
@pytest.mark.parametrize("layers", range(1, 34))
def test_it_acts_inside_any_model(name: str, layers: int, weights: str) -> None:
    at = make(name, weights).layers(layers)
    assert list(at) == sorted(set(at))
    assert all(0 <= layer < layers for layer in at)
    assert at or layers == 1


@every_method
def test_method_is_a_frozen_dataclass_that_declares_itself(name: str, weights: str) -> None:
    method = load_reducer(name)
    assert method.name == name
    assert method.paper.startswith("arXiv:")
    assert dataclasses.fields(method)[0].name == "keep"
    # the question comes behind what a trained network looks at
    assert method.needs_query != method.trained_weights
    assert method.trained_weights == (name in WITH_WEIGHTS)
    assert method.needs_whole_item
    assert method.count == "exact"
    with pytest.raises(BadRequest, match="Expected keep above 0 to 1"):
        make(name, weights, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(name, weights).keep = 1.0  # type: ignore[misc]  # assigning is what must fail


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"fastv, holitom_m, .*, but got 'fast'"):
        make_reducer("fast")


def test_where_they_act_in_the_papers_models() -> None:
    assert make_reducer("fastv").layers(32) == (2,)
    assert make_reducer("holitom_m").layers(28) == (18,)
    assert make_reducer("cdpruner").layers(28) == (0,)
    assert make_reducer("sparsevlm").layers(32) == (0, 3, 7, 16)
    assert make_reducer("prunevid_m").layers(32) == (11,)
    assert make_reducer("framefusion_m").layers(28) == (0, 1, 2, 3)
    assert make_reducer("flashvid_m").layers(28) == (20,)


def test_a_layer_that_a_model_does_not_have_is_refused() -> None:
    assert make_reducer("fastv").layers(2) == (1,)
    assert make_reducer("fastv", layer=3).layers(4) == (3,)
    with pytest.raises(BadRequest, match=r"Expected a layer below 4 with prune fastv, .*, but got 4"):
        make_reducer("fastv", layer=4).layers(4)


def test_the_contract_needs_no_torch() -> None:
    code = "import sys, mmserve.pruning.inner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# attention


def literal_attention(view: InnerView) -> Tensor:
    """Row by row, key by key."""
    assert view.queries is not None
    assert view.keys is not None
    total, rows = view.keys.shape[1], len(view.hidden)
    paid = torch.zeros(len(view.queries), rows)
    for index, query in enumerate(view.queries):
        seen = total - len(view.queries) + index + 1
        for head, one in enumerate(query):
            scores = [float(one @ key) / math.sqrt(WIDTH) for key in view.keys[head // GROUP, :seen]]
            weights = [math.exp(score - max(scores)) for score in scores]
            for at, weight in enumerate(weights):
                if at >= total - rows:
                    paid[index, at - total + rows] += weight / sum(weights) / len(query)
    return paid


@pytest.mark.parametrize("before", [0, 3])
def test_attention_is_the_mean_over_heads_of_causal_softmax(before: int) -> None:
    view = make_view(6, before=before)
    expected = literal_attention(view)
    torch.testing.assert_close(view.attention(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(view.attention(2), expected[-2:], rtol=1e-5, atol=1e-6)


def test_fastv_keeps_what_the_last_row_looks_at() -> None:
    view = make_view(20, seed=3)
    paid = literal_attention(view)[-1, :20].tolist()
    best = sorted(range(20), key=lambda row: (-paid[row], row))[:7]
    found = make_reducer("fastv", 0.35).reduce(view)
    assert found.rows.tolist() == [*sorted(best), *range(20, 26)]
    assert torch.equal(found.hidden, view.hidden[found.rows])


# HoliTom's merge


def one_by_one(kept: Tensor, dropped: Tensor) -> Tensor:
    """As published."""
    out = kept.clone()
    for token in dropped:
        goal = int(cosine_similarity(token[None], kept, dim=1).argmax())
        out[goal] = (out[goal] + token) / 2
    return out


@given(kept=st.integers(1, 12), dropped=st.integers(0, 60), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_merging_at_once_is_merging_one_by_one(kept: int, dropped: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    into, tokens = torch.randn(kept, HIDDEN, generator=rng), torch.randn(dropped, HIDDEN, generator=rng)
    torch.testing.assert_close(merge_into(into, tokens), one_by_one(into, tokens), rtol=1e-5, atol=1e-6)


def test_many_dropped_tokens_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmserve.pruning.holitom_m._BLOCK", 7)
    rng = torch.Generator().manual_seed(1)
    into, tokens = torch.randn(4, HIDDEN, generator=rng), torch.randn(30, HIDDEN, generator=rng)
    torch.testing.assert_close(merge_into(into, tokens), one_by_one(into, tokens), rtol=1e-5, atol=1e-6)


def test_holitom_merges_what_the_last_row_looks_past() -> None:
    view = make_view(20, seed=5)
    paid = literal_attention(view)[-1, :20].tolist()
    kept = sorted(sorted(range(20), key=lambda row: (-paid[row], row))[:10])
    dropped = [row for row in range(20) if row not in kept]
    found = make_reducer("holitom_m").reduce(view)
    assert found.rows.tolist() == [*kept, *range(20, 26)]
    expected = one_by_one(view.hidden[kept], view.hidden[dropped])
    torch.testing.assert_close(found.hidden[:10], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.hidden[10:], view.hidden[20:])
    constant = dataclasses.replace(view, hidden=torch.full_like(view.hidden, 3.0))
    assert torch.equal(make_reducer("holitom_m").reduce(constant).hidden, torch.full((16, HIDDEN), 3.0))


# CDPruner


@pytest.mark.parametrize("seed", range(6))
def test_each_choice_adds_most_to_the_determinant(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.nn.functional.normalize(torch.randn(14, HIDDEN, generator=rng), dim=1)
    weight = torch.rand(14, generator=rng) * 0.9 + 0.1
    kernel = (weight[:, None] * (tokens @ tokens.T) * weight).double()
    chosen: list[int] = []
    for _ in range(9):
        gains = {
            row: float(torch.linalg.det(kernel[[*chosen, row]][:, [*chosen, row]]))
            for row in range(14)
            if row not in chosen
        }
        chosen.append(max(gains, key=lambda row: gains[row]))
    assert most_diverse(tokens, weight, 9).tolist() == chosen


def test_greedy_choices_come_near_the_best_subset() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(10, HIDDEN, generator=rng), dim=1)
    kernel = (tokens @ tokens.T).double()
    greedy = most_diverse(tokens, torch.ones(10), 4).tolist()
    dets = [float(torch.linalg.det(kernel[list(rows)][:, list(rows)])) for rows in combinations(range(10), 4)]
    found = float(torch.linalg.det(kernel[greedy][:, greedy]))
    assert found >= 0.7 * max(dets)


def test_when_nothing_is_new_any_more_relevance_decides() -> None:
    basis = torch.eye(3, HIDDEN)
    tokens = basis[[0, 0, 1, 1, 2, 2, 0]]
    weight = torch.tensor([0.9, 1.0, 0.5, 0.6, 0.4, 0.3, 0.8])
    assert most_diverse(tokens, weight, 3).tolist() == [1, 3, 4]
    assert most_diverse(tokens, weight, 5).tolist() == [1, 3, 4, 0, 6]


def test_relevance_is_the_mean_cosine_from_0_to_1() -> None:
    rng = torch.Generator().manual_seed(2)
    tokens, words = torch.randn(9, HIDDEN, generator=rng), torch.randn(4, HIDDEN, generator=rng)
    means = torch.stack([torch.stack([cosine_similarity(t, w, dim=0) for w in words]).mean() for t in tokens])
    expected = (means - means.min()) / (means.max() - means.min())
    unit = (torch.nn.functional.normalize(rows, dim=1) for rows in (tokens, words))
    torch.testing.assert_close(relevance(*unit), expected, rtol=1e-4, atol=1e-4)
    assert relevance(tokens, words[:0]).tolist() == [1.0] * 9


# SparseVLM


def test_words_that_the_picture_points_at_are_raters() -> None:
    view = make_view(10, words=6, seed=1)
    words = view.hidden[11:]
    pointed = [0.0] * 6
    for token in view.hidden[:10]:
        scores = [math.exp(float(token @ word)) for word in words]
        for at, score in enumerate(scores):
            pointed[at] += score / sum(scores) / 10
    assert raters(view).tolist() == [one > sum(pointed) / 6 for one in pointed]


@given(present=st.integers(1, 3000), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_tenth_of_the_best_third_comes_back(present: int, share: float) -> None:
    count = max(1, round(share * present))
    clusters = recycled(present, count)
    dropped = present - (count - clusters)
    assert 0 <= clusters < count
    if clusters < count - 1:
        assert clusters == ((int(0.3 * dropped + 1e-9) + 1) // 10 + 1 if dropped else 0)


def test_a_stage_keeps_the_best_rated_and_means_of_the_next_best() -> None:
    view = make_view(60, words=6, seed=7)
    memory = raters(view)
    view = dataclasses.replace(view, stage=1, stages=4, memory=memory)
    count = exact_count(0.3 ** (1 / 3), 60)
    clusters = recycled(60, count)
    scores = literal_attention(view)[memory].mean(0)[:60].tolist()
    ranked = sorted(range(60), key=lambda row: (-scores[row], row))
    kept = ranked[: count - clusters]
    found = make_reducer("sparsevlm", 0.3).reduce(view)
    rows = found.rows.tolist()
    assert [row for row in kept if row not in rows] == []
    assert len([row for row in rows if row < 60]) == count
    dropped = len(ranked) - len(kept)
    candidates = ranked[len(kept) :][: dropped * 3 // 10 + 1]
    centres = [row for row in rows if row < 60 and row not in kept]
    assert set(centres) <= set(candidates)
    # every candidate is in the mean of the centre that is nearest to it
    nearest = {
        row: row
        if row in centres
        else min(centres, key=lambda centre: float((view.hidden[centre] - view.hidden[row]).norm()))
        for row in candidates
    }
    for centre in centres:
        members = [row for row, its in nearest.items() if its == centre]
        torch.testing.assert_close(
            found.hidden[rows.index(centre)], view.hidden[members].mean(0), rtol=1e-4, atol=1e-5
        )
    for row in kept:
        assert torch.equal(found.hidden[rows.index(row)], view.hidden[row])
