"""Chunks under a pattern on every backend, against attention under a mask; and what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView, Skipping, make_pattern
from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.density import pairs_of
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.probe import Probe
from mmserve.attention.rules import Rules
from mmserve.attention.sparse import PromptPattern, SlotKinds, SparseRows
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.prefill_attention import AttentionIndex, cpu_tiles
from mmserve.kernels.prefill_attention.index import Tile, key_orders, pack_tiles, tile_keys, tile_rows_of
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from tests.attention.views import attend, causal, checked, index_of, kinds, view

LAYERS, KV_HEADS, HEADS, WIDTH, PAGE_SIZE = 2, 2, 4, 16, 4
SPEC = "t9 v6x8 t3 i11 t12"
BACKENDS = {
    "reference": (PagedAttention, "naive"),
    "cpu": (CpuAttention, "naive"),
    "cuda": (CudaAttention, "naive"),
    "triton": (CudaAttention, "interpret"),
}


@dataclass(slots=True)
class Scattered:
    """Random keys of an axis that begins with what is visual; remembers what it was shown."""

    skips: bool = False
    views: list[ChunkView] = field(default_factory=list)

    def index(self, shown: ChunkView) -> AttentionIndex | Skipping:
        self.views.append(shown)
        draw = np.random.default_rng(shown.layer)
        axis = np.argsort(~shown.is_visual, kind="stable")
        place = np.argsort(axis)
        tiles = []
        for head in range(shown.queries.shape[1]):
            for first in range(0, len(shown.rows), 10):
                rows = range(first, min(first + 10, len(shown.rows)))
                taken = draw.random(len(axis)) < 0.3
                taken[place[shown.rows[list(rows)]]] = True
                blocks = [at for at in range(len(axis) // 16) if draw.random() < 0.3]
                for block in blocks:
                    taken[16 * block : 16 * block + 16] = False
                columns = np.flatnonzero(taken)
                run = [(int(columns[0]), 1, 1)] if len(columns) else []
                tiles.append(Tile(0, head, rows, run, blocks, columns[1:].tolist()))
        index = pack_tiles(
            tiles,
            row_order=torch.from_numpy(shown.rows),
            key_begin=torch.zeros(1, shown.keys.shape[1], dtype=torch.int64),
            tile_rows=16,
            block_size=16,
            key_order=torch.from_numpy(axis.astype(np.int32)),
            key_slot=torch.from_numpy(axis.astype(np.int32)),
        )
        return Skipping(index, 1e-9) if self.skips else index


class Prompts:
    """Prompts in pages, and what every layer holds of them."""

    def __init__(self, kind: type[PagedAttention], dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.dtype = kind, dtype
        self.table = PageTable(LAYERS, KV_HEADS, 600, PAGE_SIZE)
        self.store = PageStore(600, PAGE_SIZE, WIDTH, dtype)
        self.draw = torch.Generator().manual_seed(3)
        self.keys: dict[str, list[Tensor]] = {}
        self.values: dict[str, list[Tensor]] = {}

    def step(
        self, work: dict[str, tuple[range, SparseRows | None]], layers: Sequence[int] = range(LAYERS)
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Queries and outputs of every sequence, layer by layer."""
        batch, start = [], 0
        for name, (rows, sparse) in work.items():
            order = np.arange(rows.start, rows.stop, dtype=np.int32)
            self.table.append(name, order, order)
            batch.append(SequenceRows(name, start, start + len(rows), sparse=sparse))
            start += len(rows)
        attention = self.kind(self.table, self.store, batch)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in work}
        for layer in layers:
            q, k, v = (
                torch.randn(start, heads, WIDTH, generator=self.draw).to(self.dtype)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            out = attention.attend(layer, q, k, v)
            for name, here, stop, *_ in batch:
                for record, new in ((self.keys, k), (self.values, v)):
                    parts = record.setdefault(name, [new[:0]] * LAYERS)
                    parts[layer] = torch.cat([parts[layer], new[here:stop]])
                found[name].append((q[here:stop], out[here:stop]))
        return found

    def shown(self, name: str, layer: int, q: Tensor, of: SlotKinds) -> ChunkView:
        """All rows of a chunk with these queries."""
        slots = len(self.keys[name][layer])
        return ChunkView(
            layer=layer,
            layers=LAYERS,
            queries=q,
            keys=self.keys[name][layer],
            values=self.values[name][layer],
            rows=np.arange(slots - len(q), slots, dtype=np.int32),
            is_visual=of.is_visual[:slots],
            item=of.item[:slots],
            frame=of.frame[:slots],
            tile_rows=16,
        )


@pytest.fixture(params=BACKENDS)
def prompts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    kind, kernels = BACKENDS[request.param]
    monkeypatch.setenv(VARIABLE, kernels)
    return Prompts(kind)


def prompt(
    pattern: AttentionPattern | Scattered | None, dense_below: int = 0, layers: int = 0
) -> PromptPattern:
    # only `index` of it is used
    return PromptPattern(pattern=cast("AttentionPattern", pattern), rules=Rules(dense_below, layers))


def chunk(rows: range, sparse: PromptPattern, *, is_end: bool = False) -> tuple[range, SparseRows]:
    is_visual, item, frame = kinds(SPEC)
    here = slice(rows.stop)
    return rows, SparseRows(sparse, SlotKinds(is_visual[here], item[here], frame[here]), is_end)


def expected(of: ChunkView, pattern: Scattered | AttentionPattern, taken: int) -> Tensor:
    """The pattern's mask for the rows that it takes, causal attention of the others."""
    mask = causal(of).expand(HEADS, -1, -1).clone()
    if taken:
        cut = ChunkView(**{name: getattr(of, name) for name in ChunkView.__slots__} | {
            "queries": of.queries[:taken], "rows": of.rows[:taken]
        })  # fmt: skip
        index = index_of(pattern.index(cut))
        assert index is not None
        mask[:, :taken] = checked(index, cut)
    return attend(of, mask)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_chunks_beside_others_are_attention_under_the_patterns_mask(prompts: Prompts) -> None:
    check_chunks(prompts, Scattered())


@pytest.mark.parametrize("kind", [CpuAttention, CudaAttention])
def test_so_they_are_where_keys_lie_in_one_run_and_blocks_are_skipped(kind: type[PagedAttention]) -> None:
    prompts = Prompts(kind)
    for name in "abc":
        prompts.table.reserve(name, len(kinds(SPEC).item) + 1)
    check_chunks(prompts, Scattered(skips=True))


def test_kernels_read_each_head_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "interpret")
    prompts, of = Prompts(CudaAttention), kinds(SPEC)
    prompts.table.reserve("a", 57)
    pattern = make_pattern("a_shape", sink=2, local_frames=2)
    for layer, (q, out) in enumerate(prompts.step({"a": chunk(range(57), prompt(pattern))})["a"]):
        assert_near(out, expected(prompts.shown("a", layer, q, of), pattern, 57))


def check_chunks(prompts: Prompts, pattern: Scattered) -> None:
    """Two prompts under a pattern, and between them a dense one."""
    of, sparse = kinds(SPEC), prompt(pattern)
    other = prompt(make_pattern("a_shape", sink=2, local=5))
    slots = len(of.item)
    steps = [range(50), range(50, slots)]
    for rows in steps:
        is_end = rows.stop == slots
        found = prompts.step(
            {
                "a": chunk(rows, sparse, is_end=is_end),
                "b": (rows, None),
                "c": chunk(rows, other, is_end=is_end),
            }
        )
        visual = np.flatnonzero(of.is_visual[rows.start : rows.stop])
        taken = int(visual[-1]) + 1
        for name, known in (("a", sparse), ("c", other)):
            assert known.pattern is not None
            for layer, (q, out) in enumerate(found[name]):
                assert_near(out, expected(prompts.shown(name, layer, q, of), known.pattern, taken))
        for layer, (q, out) in enumerate(found["b"]):
            shown = prompts.shown("b", layer, q, of)
            assert_near(out, attend(shown, causal(shown).expand(HEADS, -1, -1)))


def test_keys_that_lie_in_one_run_are_read_in_place() -> None:
    prompts, pattern = Prompts(CpuAttention), Scattered()
    prompts.table.reserve("a", 40)
    prompts.step({"a": chunk(range(40), prompt(pattern))})
    inside = {prompts.store.k.untyped_storage().data_ptr(), prompts.store.v.untyped_storage().data_ptr()}
    for shown in pattern.views:
        assert {x.untyped_storage().data_ptr() for x in (shown.keys, shown.values)} == inside


@pytest.mark.skipif(
    not cpu_tiles.is_available(
        torch.empty(1, 1, 16, dtype=torch.bfloat16), torch.empty(1, 1, 16, dtype=torch.bfloat16)
    ),
    reason="needs AVX512-BF16",
)
def test_compiled_tiles_give_the_same_in_bf16() -> None:
    prompts, of = Prompts(CpuAttention, torch.bfloat16), kinds(SPEC)
    sparse = prompt(make_pattern("a_shape", sink=3, local_frames=2))
    for rows in (range(40), range(40, 70)):
        for layer, (q, out) in enumerate(prompts.step({"a": chunk(rows, sparse)})["a"]):
            assert sparse.pattern is not None
            taken = int(np.flatnonzero(of.is_visual[rows.start : rows.stop])[-1]) + 1
            assert_near(
                out, expected(prompts.shown("a", layer, q, of), sparse.pattern, taken), torch.bfloat16
            )


def test_short_prompts_first_layers_and_the_question_are_dense() -> None:
    of, rules = kinds(SPEC), Rules(dense_below=50, dense_layers=1)
    visual = of.is_visual
    assert rules.sparse_rows(1, visual[:49], 49, is_end=False) == 0
    assert rules.sparse_rows(0, visual[:60], 20, is_end=False) == 0
    assert rules.sparse_rows(1, visual[:60], 20, is_end=False) == 18  # the last two are text
    assert rules.sparse_rows(1, visual, len(visual), is_end=True) == len(visual) - 12
    assert rules.sparse_rows(1, visual[:58], 20, is_end=True) == 19  # ends with a video's newline
    assert rules.sparse_rows(1, visual, 5, is_end=True) == 0
    assert Rules.of(28, "cpu").dense_layers == 2
    assert Rules.of(6, "cpu", 0) == Rules(0, 1)
    assert Rules.of(4, "meta") == Rules(Rules.of(4, "cpu").dense_below, 0)


def test_what_a_pattern_is_shown() -> None:
    prompts, pattern = Prompts(CpuAttention), Scattered()
    sparse = prompt(pattern, dense_below=10, layers=1)
    prompts.step({"a": chunk(range(9), sparse)})
    assert not pattern.views
    found = prompts.step({"a": chunk(range(9, 60), sparse)})
    assert [shown.layer for shown in pattern.views] == [1]
    for shown in pattern.views:
        # two rows of text end the chunk
        assert shown.rows.tolist() == list(range(9, 58))
        assert torch.equal(shown.queries, found["a"][shown.layer][0][:49])
        assert torch.equal(shown.keys, prompts.keys["a"][shown.layer])
        assert torch.equal(shown.values, prompts.values["a"][shown.layer])
        assert shown.item.tolist() == kinds(SPEC).item[:60].tolist()
        assert shown.frame.tolist() == kinds(SPEC).frame[:60].tolist()
        assert shown.layers == LAYERS
        assert shown.memory is sparse.memory


def brute(index: AttentionIndex, heads: range) -> tuple[int, int]:
    computed = dense = 0
    for tile in index.tiles.tolist():
        if tile[1] in heads:
            rows, keys = tile_rows_of(index, tile), tile_keys(index, tile)
            last = int(index.row_order[rows].max())
            computed += len(rows) * int((key_orders(index, tile, keys, HEADS) <= last).sum())
            dense += len(rows) * (last + 1)
    return computed, dense


def test_pairs_are_those_that_tiles_list() -> None:
    shown = view(kinds(SPEC), range(17, 70), heads=(HEADS, KV_HEADS))
    of_frames = make_pattern("a_shape", sink=5, local_frames=2).index(shown)
    strided = pack_tiles(
        [Tile(0, head, range(7, 20), [(3, 5, 12), (1, 7, 3)], [1], [0]) for head in (0, 2)],
        row_order=torch.from_numpy(shown.rows),
        key_begin=torch.zeros(1, KV_HEADS, dtype=torch.int64),
        block_size=16,
    )
    for found in (Scattered().index(shown), of_frames, strided):
        index = index_of(found)
        assert index is not None
        assert tuple(map(int, pairs_of(index))) == brute(index, range(HEADS))
        assert tuple(map(int, pairs_of(index, head=2))) == brute(index, range(2, 3))


def test_density_counts_what_was_dense_by_rule_too() -> None:
    prompts, of = Prompts(CpuAttention), kinds(SPEC)
    everything = prompt(make_pattern("a_shape").everything(), layers=1)
    nearly_nothing = prompt(make_pattern("a_shape", sink=0, local=1))
    for rows in (range(40), range(40, len(of.item))):
        is_end = rows.stop == len(of.item)
        prompts.step(
            {"a": chunk(rows, everything, is_end=is_end), "b": chunk(rows, nearly_nothing, is_end=is_end)}
        )
    assert everything.density(LAYERS) == (1.0,) * LAYERS
    text = sum(range(len(of.item) - 12, len(of.item))) + 12
    every = len(of.item) * (len(of.item) + 1) // 2
    for density in nearly_nothing.density(LAYERS):
        assert text / every < density < 0.9
    assert prompt(None).density(2) == (1.0, 1.0)


def test_an_index_of_nearly_everything_is_a_dense_pass() -> None:
    prompts, pattern = Prompts(CpuAttention), Scattered()
    everything = prompt(make_pattern("a_shape").everything())
    found = prompts.step({"a": chunk(range(57), everything), "b": chunk(range(57), prompt(pattern))})
    plain = Prompts(CpuAttention)
    dense = plain.step({"a": (range(57), None), "b": (range(57), None)})
    for layer in range(LAYERS):
        assert torch.equal(found["a"][layer][1], dense["a"][layer][1])
        assert not torch.equal(found["b"][layer][1], dense["b"][layer][1])
    assert everything.density(LAYERS) == (1.0,) * LAYERS


def test_the_probe_says_what_was_lost_and_draws_it() -> None:
    prompts, of = Prompts(CpuAttention), kinds(SPEC)
    sparse = prompt(make_pattern("a_shape", sink=4, local=1))
    sparse.probe = Probe(slots=len(of.item), layer=1, head=3)
    lost: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    for rows in (range(30), range(30, len(of.item))):
        found = prompts.step({"a": chunk(rows, sparse, is_end=rows.stop == len(of.item))})
        visual = np.flatnonzero(of.is_visual[rows.start : rows.stop])
        for layer, (q, _) in enumerate(found["a"]):
            shown = prompts.shown("a", layer, q, of)
            group = HEADS // KV_HEADS
            scores = (
                shown.queries.double().transpose(0, 1)
                @ shown.keys.double().transpose(0, 1).repeat_interleave(group, 0).transpose(1, 2)
                * shown.scale
            )
            weights = scores.masked_fill(~causal(shown), -torch.inf).softmax(-1)
            slots = torch.arange(rows.stop)
            mask = causal(shown) & ((slots < 4) | (slots >= rows.start))
            mask[int(visual[-1]) + 1 :] = causal(shown)[int(visual[-1]) + 1 :]
            lost[layer].append((weights * mask).sum(-1))
    report = sparse.probe.found(LAYERS)
    for layer, recall in enumerate(report.recall):
        assert recall == pytest.approx(float(torch.cat(lost[layer], 1).mean()), abs=1e-6)
    assert report.head_recall == pytest.approx(float(torch.cat(lost[1], 1)[3].mean()), abs=1e-6)
    assert (report.layer, report.head, report.cell, report.side) == (1, 3, 1, len(of.item))
    seen = np.frombuffer(report.seen, np.uint8).reshape(report.side, report.side)
    assert set(np.unique(seen).tolist()) == {0, 255}
    assert seen[40].tolist() == [255] * 4 + [0] * 26 + [255] * 11 + [0] * (report.side - 41)
    attention = np.frombuffer(report.attention, np.uint8).reshape(seen.shape)
    assert not attention[~np.tri(report.side, dtype=bool)].any()
    assert attention[0, 0] == 255
    assert 0 < report.head_density < 1
