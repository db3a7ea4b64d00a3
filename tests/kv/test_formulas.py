"""What each policy keeps equals what its paper's formula says, computed one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmserve.kv.allocation import over_heads, shared, whole_model
from mmserve.kv.base import Budgeted, make_policy
from mmserve.kv.policies.pyramidkv import pyramid
from mmserve.kv.policies.snapkv import SnapKV
from tests.kv.oracle import (
    HEADS,
    QUESTION,
    SCENE,
    SLOTS,
    Scores,
    ada,
    check,
    flat_best,
    group,
    of_rows,
    per_head,
    table,
    windowed,
    with_recent,
)
from tests.kv.scene import FREQUENCIES, GROUP, KV_HEADS, LAYERS, WIDTH, Scene


@pytest.mark.parametrize(("window", "pool", "pooling"), [(64, 5, "mean"), (2, 3, "mean"), (32, 7, "max")])
def test_snapkv(window: int, pool: int, pooling: str) -> None:
    policy = make_policy("snapkv", window=window, pool=pool, pooling=pooling)
    check(policy, 5, per_head(windowed(window, pool, pooling), [5] * LAYERS))


def test_snapkv_resolves_ties_to_the_lower_index() -> None:
    scene = Scene()
    for _, keys in scene.rotated:
        keys.zero_()
    # equal attention everywhere; the average over neighbours is smaller at both edges only
    assert scene.chosen(SnapKV(), 5)[0][0].tolist() == [2, 3, 4, 5, 6]


def test_adakv() -> None:
    scores = windowed(32, 7, "max")
    for floor in (0.0, 0.2, 0.6):
        check(make_policy("adakv", floor=floor), 6, ada(scores, 6, floor))


def test_h2o() -> None:
    received = table(lambda layer, head: of_rows(range(SCENE.before, SCENE.rows), layer, head))
    check(make_policy("h2o"), 6, per_head(with_recent(received, [3] * LAYERS), [6] * LAYERS))
    check(make_policy("h2o", recent=0.0), 6, per_head(received, [6] * LAYERS))


def expected_scores(sink: int, future: int, *, covariance: bool, epsilon: float) -> Scores:
    """Expected Attention with rotation matrices, in double precision."""
    half = WIDTH // 2
    first = int(SCENE.order[-1]) + 1
    rotation = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for position in range(first, first + future):
        angle = position * FREQUENCIES.double()
        for i in range(half):
            c, s = math.cos(angle[i]), math.sin(angle[i])
            rotation[i, i] += c / future
            rotation[i + half, i + half] += c / future
            rotation[i, i + half] -= s / future
            rotation[i + half, i] += s / future
    rows = [row for row in range(SCENE.before, SCENE.rows) if SCENE.order[row] >= sink]
    slots = [slot for slot in range(SCENE.rows) if SCENE.order[slot] >= sink]

    def score(layer: int, head: int) -> list[float]:
        keys = SCENE.keys(layer)[head].double()
        norms = SCENE.values[layer][head].double().norm(dim=-1)
        total = torch.zeros(SCENE.rows, dtype=torch.float64)
        for one in group(head):
            queries = SCENE.plain[layer][0][rows, one].double()
            mean = queries.mean(0)
            centred = queries - mean
            spread = rotation @ (centred.T @ centred / len(rows)) @ rotation.T
            logits = keys @ (rotation @ mean) / math.sqrt(WIDTH)
            if covariance:
                logits += torch.stack([key @ spread @ key for key in keys]) / (2 * WIDTH)
            total[slots] += logits[slots].softmax(0) / GROUP
        found = (total + epsilon) * norms
        return [math.inf if SCENE.order[slot] < sink else float(found[slot]) for slot in SLOTS]

    return table(score)


@pytest.mark.parametrize(
    ("sink", "covariance", "epsilon", "floor"), [(4, True, 0.0, 0.2), (0, False, 0.01, 1.0), (11, True, 0, 0)]
)
def test_expected_attention(sink: int, covariance: bool, epsilon: float, floor: float) -> None:
    scores = expected_scores(sink, 16, covariance=covariance, epsilon=epsilon)
    policy = make_policy(
        "expected", sink=sink, future=16, covariance=covariance, epsilon=epsilon, floor=floor
    )
    check(policy, 5, ada(scores, 5, floor))


def test_vl_cache() -> None:
    scores = table(lambda layer, head: of_rows(QUESTION, layer, head))
    weights = []
    for layer in range(LAYERS):
        entries = [
            (value, max(row))
            for head in range(KV_HEADS * GROUP)
            for at in QUESTION
            for row in [SCENE.attention(layer, head, at)]
            for value in row[: at + 1]
        ]
        small = sum(value < 0.3 * most for value, most in entries)
        weights.append(1 - small / len(entries))
    budgets = [15 * weight / sum(weights) for weight in weights]
    counts = [math.floor(budget) for budget in budgets]
    for layer in sorted(range(LAYERS), key=lambda i: counts[i] - budgets[i])[: 15 - sum(counts)]:
        counts[layer] += 1
    recent = [int(0.4 * count) for count in counts]
    assert len(set(counts)) > 1
    check(
        make_policy("vl_cache", threshold=0.3, recent=0.4),
        5,
        per_head(with_recent(scores, recent), counts),
    )


def test_pyramidkv() -> None:
    assert pyramid([8, 8, 8], [17, 17, 17], 4) == [14, 8, 2]
    # as steep as the slots that there are allow
    assert pyramid([10, 10, 10], [17, 17, 17], 20) == [17, 10, 3]
    assert pyramid([17, 17, 17], [17, 17, 17], 20) == [17, 17, 17]
    check(make_policy("pyramidkv", beta=4.0), 8, per_head(windowed(64, 5), [14, 8, 2]))


def test_dynamickv() -> None:
    scores = windowed(32, 5)
    hits = [sum(map(len, layer)) for layer in flat_best(scores, 5 * KV_HEADS * LAYERS)]
    assert len(set(hits)) > 1
    counts = shared(15, hits, [SCENE.visual] * LAYERS)
    assert sum(counts) == 15
    assert all(abs(count - 15 * hit / sum(hits)) < 1 for count, hit in zip(counts, hits, strict=True))
    check(make_policy("dynamickv"), 5, per_head(scores, counts))
    most = SCENE.chosen(make_policy("dynamickv", most=1.0), 5)
    assert {len(head) for layer in most for head in layer} == {5}


def test_sagekv() -> None:
    last = table(lambda layer, head: of_rows([SCENE.rows - 1], layer, head))
    check(make_policy("sagekv"), 6, per_head(last, [6] * LAYERS))
    recent = per_head(with_recent(last, [3] * LAYERS), [6] * LAYERS)
    check(make_policy("sagekv", recent=0.5), 6, recent)


def test_fastkv() -> None:
    check(make_policy("fastkv", window=3, pool=3), 5, per_head(windowed(3, 3), [5] * LAYERS))


def test_knorm() -> None:
    norms = table(lambda layer, head: [-float(SCENE.keys(layer)[head, slot].norm()) for slot in SLOTS])
    check(make_policy("knorm"), 5, per_head(norms, [5] * LAYERS))


def test_streaming() -> None:
    last = list(range(SCENE.visual))
    check(make_policy("streaming"), 4, [[last[-4:]] * KV_HEADS] * LAYERS)
    # orders of visual slots begin with 7
    check(make_policy("streaming", sink=10), 4, [[[0, 1, *last[-2:]]] * KV_HEADS] * LAYERS)


def test_random_differs_between_heads_layers_and_prompts() -> None:
    policy = make_policy("random")
    first, second = SCENE.chosen(policy, 5), Scene(before=4).chosen(policy, 5)
    assert not np.array_equal(first[0][0], first[0][1])
    assert not np.array_equal(first[0][0], first[1][0])
    assert not np.array_equal(first[0][0], second[0][0])


@pytest.mark.parametrize("layerwise", [False, True])
def test_kvzip(layerwise: bool) -> None:
    """Each slot by the largest attention of the chunk that repeats it, which sees that one and itself."""
    chunk, sink = 16, 4

    def score(layer: int, head: int) -> list[float]:
        found = []
        keys = SCENE.keys(layer)[head].double()
        for start in range(SLOTS.start, SLOTS.stop, chunk):
            stop = min(start + chunk, SLOTS.stop)
            always = [slot for slot in range(SCENE.rows) if SCENE.order[slot] < sink and slot < start]
            most = [0.0] * (stop - start)
            for one in group(head):
                for at in range(start, stop):
                    query = SCENE.rotated[layer][0][at, one].double()
                    seen = torch.cat([keys[always], keys[start:stop], keys[start : at + 1] * 0.5])
                    paid = (seen @ query / math.sqrt(WIDTH)).softmax(0)[len(always) :]
                    most = [max(a, float(b)) for a, b in zip(most, paid, strict=False)]
            found += most
        return found

    scores = table(score)
    policy = make_policy("kvzip", chunk=chunk, sink=sink, layerwise=layerwise)
    check(policy, 5, ada(scores, 5, 0.0) if layerwise else flat_best(scores, 5 * KV_HEADS * LAYERS))


def test_zipvl() -> None:
    rows = range(SCENE.before, SCENE.rows)
    counts, scores = [], []
    for layer in range(LAYERS):
        received = [
            sum(column) / KV_HEADS for column in zip(*(of_rows(rows, layer, h) for h in HEADS), strict=True)
        ]
        falling = sorted(received, reverse=True)
        counts.append(next(n for n in range(1, 18) if sum(falling[:n]) >= 0.6 * sum(falling) - 1e-9))
        seen = [SCENE.rows - slot for slot in SLOTS]
        scores.append(
            [[value / rows_seen for value, rows_seen in zip(received, seen, strict=True)]] * KV_HEADS
        )
    assert max(counts) < SCENE.visual
    check(make_policy("zipvl", tau=0.6), SCENE.visual, per_head(scores, counts))
    check(make_policy("zipvl", tau=0.6), 3, per_head(scores, [min(count, 3) for count in counts]))


def test_elastic_and_look_m_choose_by_accumulated_attention() -> None:
    rows = range(SCENE.before, SCENE.rows)
    received = table(lambda layer, head: of_rows(rows, layer, head))
    mean = [
        [[sum(column) / KV_HEADS for column in zip(*layer, strict=True)]] * KV_HEADS for layer in received
    ]
    check(make_policy("elastic"), 6, per_head(mean, [6] * LAYERS))
    check(make_policy("look_m"), 6, per_head(with_recent(received, [3] * LAYERS), [6] * LAYERS))


def test_meda() -> None:
    rows = range(SCENE.before, SCENE.rows)
    entropies = []
    for layer in range(LAYERS):
        each = [
            -sum(value * math.log(value) for value in SCENE.attention(layer, head, row) if value > 0)
            for head in range(KV_HEADS * GROUP)
            for row in rows
        ]
        entropies.append(sum(each) / len(each))
    weights = [math.exp(entropy) for entropy in entropies]
    counts = shared(15, weights, [SCENE.visual] * LAYERS, least=0.01)
    received = table(lambda layer, head: of_rows(rows, layer, head))
    recent = [count // 2 for count in counts]
    assert len(set(counts)) > 1
    check(make_policy("meda"), 5, per_head(with_recent(received, recent), counts))


def test_look_m_draws_what_leaves_halfway_to_its_pivot() -> None:
    view = SCENE.view(0)
    kept, evicted = torch.tensor([0, 3, 7, 20, 24]), torch.tensor([4, 5, 6, 8])
    for merging in ("pivot", "mean"):
        policy = make_policy("look_m", merging=merging)
        found = policy.merge(view, 1, kept, evicted)
        keys = view.keys[1]
        goes_to = []
        for slot in evicted.tolist():
            cosine = [
                float(keys[slot] @ keys[other] / (keys[slot].norm() * keys[other].norm())) for other in kept
            ]
            goes_to.append(cosine.index(max(cosine)))
        for rows, merged in zip((keys, view.values[1]), found, strict=True):
            for place, slot in enumerate(kept.tolist()):
                parts = [rows[slot]]
                for other, target in zip(evicted.tolist(), goes_to, strict=True):
                    if target == place:
                        parts.append((rows[other] + rows[slot]) / 2 if merging == "pivot" else rows[other])
                torch.testing.assert_close(merged[place], torch.stack(parts).mean(0))


def test_elastic_averages_what_leaves_into_the_nearest_slot() -> None:
    view = SCENE.view(1)
    kept, evicted = torch.tensor([0, 3, 7, 20]), torch.tensor([4, 5, 6, 21, 24])
    keys, values = make_policy("elastic").merge(view, 0, kept, evicted)
    # 5 is as near to 3 as to 7
    parts = [[0], [3, 4, 5], [7, 6], [20, 21, 24]]
    for rows, merged in ((view.keys[0], keys), (view.values[0], values)):
        for place, slots in enumerate(parts):
            torch.testing.assert_close(merged[place], rows[slots].mean(0))


@pytest.mark.parametrize(
    ("name", "settings", "rows"), [("laq", {"ahead": 2, "window": 3}, 5), ("dapq", {}, 5)]
)
def test_queries_of_a_probe_are_looked_through(name: str, settings: dict[str, int], rows: int) -> None:
    # the last queries stand for those that a probe ran; that it does is for the engine's tests
    policy = make_policy(name, pool=3, **settings)
    views = [SCENE.view(layer) for layer in range(LAYERS)]
    chosen = policy.allocate([policy.scores(view) for view in views], Budgeted([5] * LAYERS, [1.0] * LAYERS))
    scores = windowed(rows, 3, "max" if name == "laq" else "mean")
    expected = per_head(scores, [5] * LAYERS)
    assert [[head.tolist() for head in layer] for layer in chosen] == expected


# sharing out


def test_shares_are_whole_and_keep_their_bounds() -> None:
    assert shared(10, [1, 1, 2], [9, 9, 9]) == [3, 2, 5]
    assert shared(10, [0, 0, 0], [9, 9, 9]) == [4, 3, 3]
    assert shared(10, [1, 0, 9], [9, 9, 4]) == [6, 0, 4]
    assert shared(100, [1, 2, 3], [5, 6, 7]) == [5, 6, 7]
    assert shared(30, [1, 1, 1000], [40, 40, 40], least=0.1) == [4, 4, 22]
    # where even the least is too much
    assert shared(3, [1, 1, 1], [40, 40, 40], least=0.5) == [1, 1, 1]


def test_layers_without_visual_slots_take_no_part() -> None:
    scores = [torch.zeros(2, 0), torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 4.0]])]
    assert [[head.tolist() for head in layer] for layer in whole_model(scores, [0, 1])] == [
        [[], []],
        [[], [1, 2]],
    ]
    assert [head.tolist() for head in over_heads(scores, [0, 1], 1.0)[1]] == [[1], [1]]
