"""Prefill with the grid pattern, its index included, beside dense attention; the whole of a decoder at 1M.

The queries and keys have a grid in them, a different one for each KV head, so that what the index finds can
be checked and what it leaves out weighs little, as in a model's grid heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from mmserve.bench.gpu.dense import causal_index
from mmserve.bench.gpu.grid import RUNS, Choice, Grid, choose, index_of, pairs_of
from mmserve.bench.gpu.measure import Run, Session, random
from mmserve.bench.gpu.peers import flex, sdpa
from mmserve.bench.gpu.stack import StackSizes, end_to_end
from mmserve.bench.pairing import Metric
from mmserve.kernels.prefill_attention import AttentionIndex, naive, prefill_attention
from mmserve.kernels.prefill_attention.index import check_index, tile_rows_of

GATES = {1 << 17: 3.0, 1 << 20: 8.3}
TOLERANCE = 2e-2
SHARPNESS = 3  # of checked queries: the mean over many keys would be near 0, whatever is wrong
LIFTED_SCORE = 9.0  # of the keys of a class, where others are normal: they get most of the weight
CHECKED_TILES = 12  # of each kind
WITHIN_S = 60.0  # the rounds of one length


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """`planted` are the strides of the KV heads' grids."""

    lengths: tuple[int, ...] = tuple(1 << power for power in range(13, 21))  # 8K to 1M
    group: int = 7
    planted: tuple[int, ...] = (144, 170, 196, 256)
    width: int = 128
    grid: Grid = field(default_factory=Grid)
    longest_whole: int = 1 << 17  # longer ones: dense attention of one KV head and its query heads, scaled
    stack: StackSizes = field(default_factory=StackSizes)


SMOKE = Sizes(
    lengths=(48, 96),
    group=2,
    planted=(12, 16),
    width=16,
    grid=Grid(strides=(12, 13, 16), sink=8, local=16, tail=8, tile_rows=32),
    longest_whole=48,
    stack=StackSizes(geometry="nano", layers=1, length=24, chunk=16, stride=16, checked_rows=12),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    q: Tensor  # [S, Hq, d]
    k: Tensor  # [S, Hkv, d]
    v: Tensor
    scale: float


def run(session: Session) -> None:
    sizes = SMOKE if session.is_smoke else Sizes()
    dense: dict[str, float] = {}  # seconds of all heads at the length before
    for length in sizes.lengths:
        heads_share = 1 if length <= sizes.longest_whole else len(sizes.planted)
        # a warm-up, a first run and a round, each four times that of half the length
        if not session.has_time(f"sparse_{length}", 12 * sum(dense.values()) / heads_share):
            return
        dense = _measure(session, sizes, length)
    end_to_end(session, sizes.stack, sizes.grid, dense)


def _measure(session: Session, sizes: Sizes, length: int) -> dict[str, float]:
    """Adds the rows of one length; seconds of dense attention by side."""
    name, grid = f"sparse_{length}", sizes.grid
    prompt = _planted(session, sizes, length)
    q, k, v, scale = prompt.q, prompt.k, prompt.v, prompt.scale
    strides = torch.tensor(grid.strides, dtype=torch.int32, device=q.device)

    def index() -> AttentionIndex:
        return index_of(choose(q, k, strides, grid, scale=scale), length, len(sizes.planted), grid)

    choice = choose(q, k, strides, grid, scale=scale)
    _check_choice(session, sizes, name, choice)
    built = index_of(choice, length, len(sizes.planted), grid)
    _check_tiles(session, name, replace(prompt, q=q * SHARPNESS), built)
    # of one KV head where all would take too long: dense attention costs the same in every head
    share = 1 if length <= sizes.longest_whole else len(sizes.planted)
    heads = q.shape[1] // share
    part_q, part_k, part_v = (x[:, : x.shape[1] // share].contiguous() for x in (q, k, v))
    part = Prompt(part_q, part_k, part_v, scale)
    dense = causal_index(part.q, part.k)

    def ours() -> Tensor:
        return prefill_attention(q, k, v, index(), scale=scale).out

    def whole() -> Tensor:
        return prefill_attention(part.q, part.k, part.v, dense, scale=scale).lse

    kept = prefill_attention(q, k, v, built, scale=scale).lse[:, :heads] - whole()
    notes: dict[str, object] = {
        "recall": round(float(kept.exp().clamp(max=1).mean()), 4),
        "density": round(pairs_of(built) / (q.shape[1] * length * (length + 1) / 2), 4),
    }
    del built, kept
    taken = session.times(
        name,
        {"ours": ours, "index": index, "dense": whole, **_torch_sides(part, length)},
        WITHIN_S,
    )
    session.add(Metric(name=f"{name}_index", unit="ms"), [s * 1e3 for s in taken.pop("index")], None)
    sparse = [s * 1e3 for s in taken.pop("ours")]
    scaled = {} if share == 1 else {"scaled_from": f"{heads} of {q.shape[1]} query heads"}
    for side, seconds in taken.items():
        metric = Metric(name=f"{name}_vs_{side}", unit="ms", gate=GATES.get(length))
        session.add(metric, sparse, [s * share * 1e3 for s in seconds], **notes, **scaled)
    return {side: median(seconds) * share for side, seconds in taken.items()}


def _torch_sides(part: Prompt, length: int) -> dict[str, Run]:
    # the layout that torch's kernels are made for
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (part.q, part.k, part.v))
    sides: dict[str, Run] = {**sdpa(q, k, v, is_causal=True)}
    # it compiles anew for each length, which takes longer than all else
    return sides | flex(q, k, v) if length in GATES else sides


def _planted(session: Session, sizes: Sizes, length: int) -> Prompt:
    """Noise, and in each KV head a direction that keys of a class have and rows outside it look for."""
    kv_heads, width = len(sizes.planted), sizes.width
    q, k, v = (
        random((length, heads, width), session, seed)
        for seed, heads in enumerate((kv_heads * sizes.group, kv_heads, kv_heads))
    )
    # query times key then adds strength^2 * width / sqrt(width) to a score
    strength = (LIFTED_SCORE / width**0.5) ** 0.5
    signs = random((kv_heads, width), session, 3).sign() * strength
    place = torch.arange(length, device=q.device)
    for head, stride in enumerate(sizes.planted):
        in_class = place % stride == _first_of(stride)
        k[in_class, head] += signs[head]
        for query_head in range(head * sizes.group, (head + 1) * sizes.group):
            q[:, query_head] += torch.where(in_class[:, None], 0, signs[head])
    return Prompt(q, k, v, width**-0.5)


def _first_of(stride: int) -> int:
    """The class that is planted."""
    return 5 * stride // 7


def _check_choice(session: Session, sizes: Sizes, name: str, found: Choice) -> None:
    strides = [stride for stride in sizes.planted for _ in range(sizes.group)]
    expected = [strides, [_first_of(stride) for stride in strides], [1] * len(strides)]
    tensor = torch.tensor(expected, device=found.stride.device)
    chosen = torch.stack([part.int() for part in found])
    session.check(f"{name}: strides and classes of all heads", chosen, tensor, 0.0)


def _check_tiles(session: Session, name: str, prompt: Prompt, index: AttentionIndex) -> None:
    """Some tiles of each kind against the oracle, which reads the same index; the kernel computes all."""
    q, k, v, scale = prompt.q, prompt.k, prompt.v, prompt.scale
    found = prefill_attention(q, k, v, index, scale=scale).out
    index = replace(index, tiles=torch.cat([_some_tiles(index, runs) for runs in (1, RUNS)]))
    length = torch.full((1, k.shape[1]), len(k))
    check_index(index, length, q_heads=q.shape[1])
    expected = naive.prefill_attention(q, k, v, index, scale=scale).out
    pairs = [(tile_rows_of(index, tile), tile[1]) for tile in index.tiles.tolist()]
    session.check(
        f"{name} against fp32 on the same index",
        torch.cat([found[rows, head] for rows, head in pairs]),
        torch.cat([expected[rows, head] for rows, head in pairs]),
        TOLERANCE,
    )


def _some_tiles(index: AttentionIndex, runs: int) -> Tensor:
    """Of those with so many runs, from the longest to the shortest."""
    tiles = index.tiles[(index.tiles[:, 5] == runs) & (index.tiles[:, 3] > 0)]
    some = torch.linspace(0, len(tiles) - 1, min(CHECKED_TILES, len(tiles)), device=tiles.device)
    return tiles[some.long()]
