"""Patterns of blocks against their papers' rules, one block of rows at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView, Skipping
from mmserve.attention.patterns.block_sparse import BlockSparse
from mmserve.attention.patterns.critiprefill import CritiPrefill
from mmserve.attention.patterns.flexprefill import FlexPrefill
from mmserve.attention.patterns.sparge import Sparge
from mmserve.attention.patterns.xattention import XAttention
from mmserve.errors import BadRequest
from tests.attention.patterns.chunks import blocks_of, chunk, seen_by, weights_of
from tests.attention.views import causal

SHAPES = [(300, 900), (256, 1024), (130, 130), (77, 500), (520, 1100)]
# a block of keys, and its mean
Means = list[Tensor]


def kv_head(view: ChunkView, head: int) -> int:
    return head // (view.queries.shape[1] // view.keys.shape[1])


def means(x: Tensor, size: int) -> Means:
    return [x[block].double().mean(0) for block in blocks_of(len(x), size)]


def pooled(view: ChunkView, head: int, rows: int, keys: int) -> list[dict[int, float]]:
    """For each block of rows, the scores of the blocks of keys whose first key its last row sees."""
    found = []
    key_means = means(view.keys[:, kv_head(view, head)], keys)
    for block, mean in zip(blocks_of(len(view.rows), rows), means(view.queries[:, head], rows), strict=True):
        last = int(view.rows[block.stop - 1])
        found.append(
            {at: float(mean @ key) * view.scale for at, key in enumerate(key_means) if at * keys <= last}
        )
    return found


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values())
    total = sum(math.exp(score - top) for score in scores.values())
    return {at: math.exp(score - top) / total for at, score in scores.items()}


def ordered(values: dict[int, float]) -> list[int]:
    return sorted(values, key=lambda at: -values[at])


def fill(seen: Tensor, view: ChunkView, rows: slice, chosen: set[int], size: int) -> None:
    """Rows of one head see these blocks of keys, and their own."""
    own = range(int(view.rows[rows.start]) // size, int(view.rows[rows.stop - 1]) // size + 1)
    for block in chosen | set(own):
        seen[rows, block * size : (block + 1) * size] = True


def nothing(view: ChunkView) -> Tensor:
    return torch.zeros(view.queries.shape[1], len(view.rows), len(view.keys), dtype=torch.bool)


@pytest.mark.parametrize(("rows", "slots"), SHAPES)
@pytest.mark.parametrize(("blocks", "size"), [(1, 64), (3, 64), (7, 64), (5, 16)])
def test_block_sparse_takes_the_best_products_of_means(rows: int, slots: int, blocks: int, size: int) -> None:
    view = chunk(rows, slots)
    expected = nothing(view)
    for head in range(len(expected)):
        scores = pooled(view, head, size, size)
        for block, row in zip(blocks_of(rows, size), scores, strict=True):
            fill(expected[head], view, block, set(ordered(row)[:blocks]), size)
    found = seen_by(BlockSparse(blocks=blocks, block=size).index(view), view)
    assert torch.equal(found, expected & causal(view))


def antidiagonals(view: ChunkView, head: int, stride: int) -> Tensor:
    """Weights of cells, fp64 [row cells, key cells], from sums over each cell's antidiagonal."""
    q, k = view.queries[:, head].double(), view.keys[:, kv_head(view, head)].double()
    products = q @ k.T
    rows, keys = (-(-len(x) // stride) for x in (q, k))
    scores = torch.full((rows, keys), -torch.inf, dtype=torch.float64)
    for i in range(rows):
        last = int(view.rows[min((i + 1) * stride, len(q)) - 1])
        for j in range(keys):
            if j * stride > last:
                continue
            pairs = [(i * stride + stride - 1 - t, j * stride + t) for t in range(stride)]
            inside = [products[a, b] for a, b in pairs if a < len(q) and b < len(k)]
            scores[i, j] = sum(float(one) for one in inside) * view.scale / stride
    return torch.softmax(scores, -1)


def cover(values: dict[int, float], forced: set[int], share: float) -> set[int]:
    """The fewest that reach a share of all, those that are forced first."""
    chosen, need = set(forced), share * sum(values.values())
    for at in ordered(values):
        if sum(values[one] for one in chosen) >= need:
            break
        chosen.add(at)
    return chosen


@pytest.mark.parametrize(("rows", "slots"), [(300, 640), (130, 130), (77, 500)])
@pytest.mark.parametrize(
    ("stride", "share", "size"), [(16, 0.5, 128), (8, 0.8, 128), (16, 0.0, 128), (8, 0.5, 32)]
)
def test_xattention_takes_the_fewest_blocks_that_reach_the_share(
    rows: int, slots: int, stride: int, share: float, size: int
) -> None:
    view = chunk(rows, slots, spread=8.0, kv_heads=1, group=2)
    expected = nothing(view)
    for head in range(len(expected)):
        weights = antidiagonals(view, head, stride)
        for block in blocks_of(rows, size):
            part = weights[block.start // stride : -(-block.stop // stride)]
            sums = {
                at: float(part[:, keys].sum())
                for at, keys in enumerate(blocks_of(weights.shape[1], size // stride))
            }
            own = range(int(view.rows[block.start]) // size, int(view.rows[block.stop - 1]) // size + 1)
            fill(expected[head], view, block, cover(sums, {0, *own}, share), size)
    found = seen_by(XAttention(threshold=share, stride=stride, block=size).index(view), view)
    assert torch.equal(found, expected & causal(view))


def test_xattention_has_a_share_for_every_head() -> None:
    view = chunk(256, 1024, spread=8.0, layer=1)
    shares = (0.0, 0.3, 0.6, 1.0)
    each = [seen_by(XAttention(threshold=share).index(view), view)[head] for head, share in enumerate(shares)]
    one_layer = XAttention(thresholds="0,0.3,0.6,1")
    assert torch.equal(seen_by(one_layer.index(view), view), torch.stack(each))
    layers = ["1,1,1,1"] * 8
    layers[1] = "0,0.3,0.6,1"
    assert torch.equal(seen_by(XAttention(thresholds=";".join(layers)).index(view), view), torch.stack(each))
    for wrong in ("0.5,0.5", "0.5,0.5,0.5,0.5;1,1,1,1"):
        with pytest.raises(BadRequest, match="4 heads"):
            XAttention(thresholds=wrong).check_model(layers=8, heads=4, width=16)
    XAttention(thresholds=";".join(layers)).check_model(layers=8, heads=4, width=16)


def divergence(one: Tensor, other: Tensor) -> float:
    total = 0.0
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        mean = (a + b) / 2
        total += sum(x * math.log(x / mean) for x in (a, b) if x > 0) / 2
    return math.sqrt(max(total, 0.0))


def minimal(weights: Tensor, share: float) -> int:
    """How many of the largest weights hold a share."""
    total, count = 0.0, 0
    for weight in sorted(weights.tolist(), reverse=True):
        total, count = total + weight, count + 1
        if total > share:
            break
    return count


def flex(view: ChunkView, head: int, pattern: FlexPrefill) -> tuple[Tensor, bool]:
    """What the rows of one head see by algorithms 1 to 4, and whether it is query-aware."""
    n, slots, size = len(view.rows), len(view.keys), pattern.block
    blocks = -(-slots // size)
    last = weights_of(view, head)[-size:]
    vertical = last.mean(0)
    slash = torch.zeros(slots, dtype=torch.float64)
    for row, slot in zip(last, view.rows[-size:].tolist(), strict=True):
        slash[: slot + 1] += row[: slot + 1].flip(0) / len(last)
    by_block = torch.stack([vertical[keys].sum() for keys in blocks_of(slots, size)])
    mean = view.queries[-size:, head].double().mean(0)
    keys = means(view.keys[:, kv_head(view, head)], size)
    estimate = torch.softmax(torch.stack([mean @ key * view.scale for key in keys]), 0)
    is_aware = divergence(estimate, by_block) < pattern.tau
    floor = -(-pattern.min_budget // size)
    # blocks are counted from keys, as in the authors' code
    counts = [
        floor if is_aware else max(floor, minimal(sums, pattern.gamma) // size + 1)
        for sums in (vertical, slash)
    ]
    slash_blocks = torch.stack([slash[keys].sum() for keys in blocks_of(slots, size)])
    by_block[0] = slash_blocks[0] = torch.inf
    columns, diagonals = (
        set(sums.topk(min(count, blocks)).indices.tolist())
        for sums, count in zip((by_block, slash_blocks), counts, strict=True)
    )
    pairs: set[tuple[int, int]] = set()
    if is_aware:
        weights = {
            (row, at): weight
            for row, scores in enumerate(pooled(view, head, size, size))
            for at, weight in softmax(scores).items()
        }
        total, need = 0.0, pattern.gamma * -(-n // size)
        for pair in sorted(weights, key=lambda one: -weights[one]):
            if total >= need:
                break
            pairs.add(pair)
            total += weights[pair]
    seen = torch.zeros(n, slots, dtype=torch.bool)
    for row, block in enumerate(blocks_of(n, size)):
        own = (int(view.rows[block.start]) + size // 2) // size
        chosen = columns | {own - offset for offset in diagonals if 0 <= own - offset < blocks}
        chosen |= {at for at in range(blocks) if (row, at) in pairs}
        fill(seen, view, block, chosen, size)
    return seen & causal(view), is_aware


@pytest.mark.parametrize(("rows", "slots"), [*SHAPES, (256, 1500), (300, 1571)])
@pytest.mark.parametrize(("tau", "size"), [(0.0, 128), (0.3, 128), (1.0, 128), (0.3, 32)])
def test_flexprefill_follows_the_authors_rules(rows: int, slots: int, tau: float, size: int) -> None:
    view = chunk(rows, slots, spread=3.0)
    # a head whose keys are alike within a block is judged by their means
    view.keys[:, 0] = view.keys[: -(-slots // size), 0].repeat_interleave(size, 0)[:slots]
    pattern = FlexPrefill(gamma=0.6, tau=tau, min_budget=200, block=size)
    found = seen_by(pattern.index(view), view)
    kinds = set()
    for head in range(4):
        expected, is_aware = flex(view, head, pattern)
        kinds.add(is_aware)
        assert torch.equal(found[head], expected)
    assert tau == 0.3 or kinds == {tau == 1.0}


def cosine(x: Tensor) -> float:
    """The mean cosine of all pairs of rows."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    return float((unit @ unit.T).mean())


@pytest.mark.parametrize(("rows", "slots"), SHAPES)
@pytest.mark.parametrize(("share", "height", "width"), [(0.2, 128, 64), (0.7, 128, 64), (0.5, 32, 128)])
def test_sparge_judges_what_is_alike_and_sees_the_rest(
    rows: int, slots: int, share: float, height: int, width: int
) -> None:
    view = chunk(rows, slots, d=4, kv_heads=1, group=2)
    # some blocks of keys and rows are alike
    rng = torch.Generator().manual_seed(1)
    for part in (view.keys, view.queries):
        for block in blocks_of(len(part), 128):
            if torch.rand((), generator=rng) < 0.6:
                part[block] = part[block] * 0.2 + part[block.start]
    expected = nothing(view)
    keys = view.keys[:, 0].double() - view.keys[:, 0].double().mean(0)
    alike = [cosine(keys[block]) > 0.5 for block in blocks_of(slots, width)]
    for head in range(2):
        for block, scores in zip(blocks_of(rows, height), pooled(view, head, height, width), strict=True):
            known = {at: score for at, score in scores.items() if alike[at]}
            chosen = {at for at, is_alike in enumerate(alike) if not is_alike}
            if cosine(view.queries[block, head]) <= 0.5:
                chosen = set(scores)
            if known:
                weights, total = softmax(known), 0.0
                for number, at in enumerate(ordered(weights)):
                    total += weights[at]
                    if number == 0 or total <= share:
                        chosen.add(at)
            fill(expected[head], view, block, chosen, width)
    pattern = Sparge(similarity=0.5, cumulative=share, rows=height, keys=width)
    found = seen_by(pattern.index(view), view)
    assert torch.equal(found, expected & causal(view))
    assert any(alike)


def test_sparges_second_stage_is_the_kernels() -> None:
    view = chunk(64, 256)
    index = Sparge(skip=0.01).index(view)
    assert isinstance(index, Skipping)
    assert index.threshold == 0.01
    assert not isinstance(Sparge(skip=0.0).index(view), Skipping)


def criticality(view: ChunkView, rows: slice, size: int) -> Tensor:
    """How much each block of keys before a segment matters to it, fp64 [Hkv, blocks]."""
    group = view.queries.shape[1] // view.keys.shape[1]
    before = int(view.rows[rows.start]) // size
    found = torch.full((view.keys.shape[1], before), -torch.inf, dtype=torch.float64)
    for head in range(view.keys.shape[1]):
        for at in range(before):
            keys = view.keys[at * size : (at + 1) * size, head].double()
            scores = []
            for member in range(head * group, (head + 1) * group):
                q = view.queries[rows, member].double()
                extremes = [q.amax(0), q.amin(0)]
                scores.append(
                    max(float(sum(one @ key for one in extremes)) / 2 for key in (keys.amax(0), keys.amin(0)))
                )
            found[head, at] = sum(scores) / group
    return torch.softmax(found, -1)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize(("rows", "slots"), [(700, 1300), (512, 1024), (100, 450), (600, 600)])
@pytest.mark.parametrize(("segment", "size"), [(512, 32), (64, 16)])
def test_critiprefill_takes_what_matters_to_a_segment(
    rows: int, slots: int, with_memory: bool, segment: int, size: int
) -> None:
    memory: dict[int, object] | None = {} if with_memory else None
    earlier = chunk(rows, slots, layer=3, seed=1, d=8, memory=memory)
    view = chunk(rows, slots, layer=4, seed=2, d=8, memory=memory)
    pattern = CritiPrefill(budget=5 * size, segment=segment, block=size)
    pattern.index(earlier)
    found = seen_by(pattern.index(view), view)
    expected = nothing(view)
    for block in blocks_of(rows, segment):
        weights = criticality(view, block, size)
        if with_memory:
            weights = 0.25 * criticality(earlier, block, size) + 0.75 * weights
        for head in range(4):
            best = weights[head // 2].topk(min(5, weights.shape[1])).indices.tolist()
            fill(expected[head], view, block, set(best), size)
    assert torch.equal(found, expected & causal(view))


def test_critiprefill_asks_the_layer_before_only_about_the_same_rows() -> None:
    memory: dict[int, object] = {}
    pattern = CritiPrefill(budget=64)
    alone = chunk(256, 1024, layer=4, seed=2)
    for other in (chunk(256, 900, layer=3, seed=1, memory=memory), chunk(256, 1024, layer=2, memory=memory)):
        pattern.index(other)
        view = chunk(256, 1024, layer=4, seed=2, memory=memory)
        assert torch.equal(seen_by(pattern.index(view), view), seen_by(pattern.index(alone), alone))
    # only the last layer is remembered
    assert len(memory) <= 2
