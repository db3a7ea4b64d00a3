"""Which lines each head of a model should have, found offline on recorded prompts (MMInference, algorithm 4).

All candidates are brought to the same cost first; what counts then is the distance of a head's output from
that of dense attention. Lines of vision come first, then those of text, then where modalities are cut.
Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.base import ChunkView, PatternMemory
from mmserve.attention.costs import Costs, measure
from mmserve.attention.patterns.mminference import index_of
from mmserve.attention.profile import BOUNDARIES, STRIDES, AttentionProfile, Head, Inputs, Lines
from mmserve.kernels.prefill_attention import dense_index, prefill_attention

# of horizontal, vertical and slash lines
GRID_FLAGS = (
    (True, False, False),
    (False, True, False),
    (False, False, True),
    (True, True, False),
    (False, True, True),
    (True, True, True),
)
# keys and diagonals: the ratios of the paper's table
VERTICAL_SLASH = ((1.0, 1.0), (1.0, 2.0), (1.0, 4.0), (2.0, 1.0), (17.5, 1.0))
BISECTIONS = 6
SLACK = 1.05  # over the budget

Floats = NDArray[np.float64]
Kind = Literal["vision", "text", "vision_to_text"]
Make = Callable[[float], Lines]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """One prompt as attention saw it: rotated queries of its last rows, all keys and values, by layer."""

    is_visual: NDArray[np.bool_]  # [S]
    item: NDArray[np.int32]
    frame: NDArray[np.int32]
    queries: tuple[Tensor, ...]  # [n, Hq, d]
    keys: tuple[Tensor, ...]  # [S, Hkv, d]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`budget` is a share of what dense attention costs; chunks are as long as serving makes them."""

    sink: int = 128
    local: int = 1024
    budget: float = 0.35  # that of the paper: a sink of 1,024 and a band of 4,096 on 25,000 tokens
    min_lift: float = 0.1
    chunk_rows: int = 512
    tile_rows: int = 192


class Outcome(NamedTuple):
    """Sums over prompts and rows, [Hq]."""

    vision: Floats  # squared distance of the outputs of rows of vision
    text: Floats
    size: Floats  # squares of dense outputs
    recall: Floats
    rows: int
    cost: Floats

    @property
    def error(self) -> Floats:
        return np.sqrt((self.vision + self.text) / np.maximum(self.size, 1e-30))


class Layer:
    """One layer of all prompts, with what dense attention gives."""

    def __init__(self, prompts: Sequence[Recorded], layer: int, plan: Plan, costs: Costs) -> None:
        self.prompts, self.layer, self.plan, self.costs = prompts, layer, plan, costs
        self.heads = prompts[0].queries[layer].shape[1]
        self.dense_cost = np.zeros(self.heads)
        self._dense = []
        for prompt in prompts:
            q, k, v = (part[layer] for part in (prompt.queries, prompt.keys, prompt.values))
            index = dense_index(
                [len(q)], [len(k)], q_heads=self.heads, kv_heads=k.shape[1],
                tile_rows=plan.tile_rows, device=q.device,
            )  # fmt: skip
            self.dense_cost += costs.of(index, self.heads)
            self._dense.append(prefill_attention(q, k, v, index, scale=q.shape[2] ** -0.5))

    def views(self, prompt: Recorded) -> Iterator[ChunkView]:
        """The chunks of a prompt, one after the other."""
        memory: PatternMemory = {}
        q, keys, values = (part[self.layer] for part in (prompt.queries, prompt.keys, prompt.values))
        begin = len(keys) - len(q)
        for start in range(begin, len(keys), self.plan.chunk_rows):
            stop = min(start + self.plan.chunk_rows, len(keys))
            yield ChunkView(
                layer=self.layer,
                layers=len(prompt.queries),
                queries=q[start - begin : stop - begin],
                keys=keys[:stop],
                values=values[:stop],
                rows=np.arange(start, stop, dtype=np.int32),
                is_visual=prompt.is_visual[:stop],
                item=prompt.item[:stop],
                frame=prompt.frame[:stop],
                tile_rows=self.plan.tile_rows,
                memory=memory,
            )

    def cost(self, heads: Sequence[Head]) -> float:
        """The share of dense attention's cost, mean over the heads."""
        total = sum(
            float(self.costs.of(index_of(view, heads, self.plan.min_lift), self.heads).sum())
            for prompt in self.prompts
            for view in self.views(prompt)
        )
        return total / float(self.dense_cost.sum())

    def run(self, heads: Sequence[Head]) -> Outcome:
        sums = np.zeros((5, self.heads))
        rows = 0
        for prompt, dense in zip(self.prompts, self._dense, strict=True):
            begin = len(prompt.is_visual) - len(dense.out)
            for view in self.views(prompt):
                index = index_of(view, heads, self.plan.min_lift)
                found = prefill_attention(view.queries, view.keys, view.values, index, scale=view.scale)
                here = slice(int(view.rows[0]) - begin, int(view.rows[-1]) + 1 - begin)
                expected = dense.out[here].float()
                distance = (found.out.float() - expected).square().sum(-1).double()
                is_visual = torch.from_numpy(view.is_visual[view.rows]).to(distance.device)
                sums[0] += distance[is_visual].sum(0).cpu().numpy()
                sums[1] += distance[~is_visual].sum(0).cpu().numpy()
                sums[2] += expected.square().sum((0, 2)).double().cpu().numpy()
                sums[3] += (found.lse - dense.lse[here]).exp().clamp(max=1).double().sum(0).cpu().numpy()
                sums[4] += self.costs.of(index, self.heads)
                rows += len(view.rows)
        return Outcome(sums[0], sums[1], sums[2], sums[3] / rows, rows, sums[4] / self.dense_cost)


def vision_candidates(plan: Plan) -> list[Make]:
    """Lines of rows of vision, by what grows with the budget: a share of the prompt in tokens."""

    def grid(stride: int, flags: tuple[bool, bool, bool]) -> Make:
        hline, vline, same = flags
        return lambda size: Lines(
            pattern="grid", sink=plan.sink, local=max(1, round(size)), otherwise=plan.local,
            stride=STRIDES[stride], hline=hline, vline=vline, same=same,
        )  # fmt: skip

    grids = [grid(stride, flags) for stride in range(len(STRIDES)) for flags in GRID_FLAGS]
    return [*grids, *text_candidates(plan)]


def text_candidates(plan: Plan) -> list[Make]:
    def vertical_slash(keys: float, offsets: float) -> Make:
        return lambda size: Lines(
            pattern="vertical_slash", sink=plan.sink, local=plan.local,
            vertical=round(size * keys / (keys + offsets)), slash=round(size * offsets / (keys + offsets)),
        )  # fmt: skip

    return [lambda size: Lines(sink=plan.sink, local=max(1, round(size)))] + [
        vertical_slash(*ratio) for ratio in VERTICAL_SLASH
    ]


def search(
    prompts: Sequence[Recorded], plan: Plan, *, model: str, inputs: Inputs, tell: Callable[[str], None]
) -> AttentionProfile:
    """The profile of a model; `tell` gets a line for every layer."""
    first = prompts[0]
    costs = measure(first.queries[0], first.keys[0], first.values[0])
    heads = []
    for layer in range(len(first.queries)):
        found = search_layer(Layer(prompts, layer, plan, costs))
        heads.append(found)
        recall, error = (np.mean([getattr(head, name) for head in found]) for name in ("recall", "error"))
        tell(f"layer {layer + 1}/{len(first.queries)}: recall {recall:.4f}, error {error:.4f}")
    return AttentionProfile(
        model=model, inputs=inputs, budget=plan.budget, costs=costs.kind, heads=tuple(heads)
    )


def search_layer(layer: Layer) -> tuple[Head, ...]:
    plan, count = layer.plan, layer.heads
    windows = Lines(sink=plan.sink, local=plan.local)
    single = Lines(pattern="vertical_slash", sink=plan.sink, local=plan.local, vertical=plan.local)
    heads = [Head(vision=windows, text=single, vision_to_text=windows, text_to_vision=single)] * count
    heads = _best(layer, heads, "vision", _fitted(layer, heads, "vision", vision_candidates(plan)))
    if any(not prompt.is_visual.all() for prompt in layer.prompts):
        texts: tuple[Kind, ...] = ("text", "vision_to_text")
        for name in texts:
            heads = _best(layer, heads, name, _fitted(layer, heads, name, text_candidates(plan)))
    cuts = [[replace(head, boundary=boundary) for head in heads] for boundary in BOUNDARIES]
    outcomes = [layer.run(each) for each in cuts]
    within = [outcome.cost <= np.maximum(SLACK * plan.budget, outcomes[-1].cost) for outcome in outcomes]
    errors = np.where(within, [outcome.error for outcome in outcomes], np.inf)
    chosen = errors.argmin(0)
    every = range(count)
    return tuple(
        replace(
            cuts[chosen[at]][at],
            recall=round(float(outcomes[chosen[at]].recall[at]), 6),
            error=round(float(outcomes[chosen[at]].error[at]), 6),
            cost=round(float(outcomes[chosen[at]].cost[at]), 6),
        )
        for at in every
    )


def _with(heads: Sequence[Head], name: Kind, lines: Lines) -> list[Head]:
    """The same heads with other lines of one kind; those of text are looked for in both modalities."""
    if name == "vision":
        return [replace(head, vision=lines) for head in heads]
    if name == "text":
        return [replace(head, text=lines, text_to_vision=lines) for head in heads]
    return [replace(head, vision_to_text=lines) for head in heads]


def _fitted(layer: Layer, heads: Sequence[Head], name: Kind, candidates: Sequence[Make]) -> list[Lines]:
    """Candidates as large as the budget lets them be; those that are too dear at any size are left out."""
    longest = max(len(prompt.is_visual) for prompt in layer.prompts)
    # lines of text add to what those of vision cost
    budget = layer.plan.budget if name == "vision" else max(layer.plan.budget, SLACK * layer.cost(heads))
    fitted = []
    for make in candidates:
        low, high, best = 0.0, 1.0, None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            lines = make(middle * longest)
            if layer.cost(_with(heads, name, lines)) <= budget:
                low, best = middle, lines
            else:
                high = middle
        if best is not None:
            fitted.append(best)
    return fitted


def _best(layer: Layer, heads: Sequence[Head], name: Kind, candidates: Sequence[Lines]) -> list[Head]:
    """Every head with the lines that bring its output nearest to that of dense attention."""
    if not candidates:
        return list(heads)
    errors = np.stack([layer.run(_with(heads, name, lines)).error for lines in candidates])
    return [_with([head], name, candidates[at])[0] for head, at in zip(heads, errors.argmin(0), strict=True)]
