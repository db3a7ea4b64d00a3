"""Columns and diagonals of a probe, by the plainest rule of who sees whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.assemble import row_blocks
from mmserve.attention.patterns.scores import last_rows, probe
from mmserve.attention.patterns.vertical_slash import VerticalSlash, columns_of, runs_of, slashes_of
from tests.attention.patterns.chunks import blocks_of, chunk, seen_by, weights_of
from tests.attention.views import causal


def sums(view: ChunkView, head: int, count: int) -> tuple[Tensor, Tensor]:
    """What columns and diagonals got from the last rows."""
    weights = weights_of(view, head)[-count:]
    slash = torch.zeros(len(view.keys), dtype=torch.float64)
    for row, slot in zip(weights, view.rows[-count:].tolist(), strict=True):
        slash[: slot + 1] += row[: slot + 1].flip(0)
    return weights.sum(0), slash


def expected(view: ChunkView, vertical: int, slash: int) -> Tensor:
    seen = torch.zeros(view.queries.shape[1], len(view.rows), len(view.keys), dtype=torch.bool)
    visible = int(view.rows[-1]) + 1
    for head in range(len(seen)):
        columns, diagonals = sums(view, head, min(64, len(view.rows)))
        columns, diagonals = columns[:visible], diagonals[:visible]
        columns[:30] = diagonals[:100] = torch.inf
        best = set(columns.topk(min(vertical, visible)).indices.tolist())
        lines = set(diagonals.topk(min(slash, visible)).indices.tolist())
        for block in blocks_of(len(view.rows), 64):
            first, last = int(view.rows[block.start]), int(view.rows[block.stop - 1])
            # a line of one row is seen by its whole block, as long as the longest one
            keys = {
                row - offset for row in range(first, first + min(64, len(view.rows))) for offset in lines
            } | best
            for key in keys & set(range(last + 1)):
                seen[head, block, key] = True
    return seen & causal(view)


@pytest.mark.parametrize(
    ("rows", "slots", "vertical", "slash"),
    [(300, 700, 50, 120), (64, 500, 30, 100), (200, 200, 60, 130), (70, 660, 400, 300), (5, 260, 31, 101)],
)
def test_rows_see_the_columns_and_diagonals_of_the_last_rows(
    rows: int, slots: int, vertical: int, slash: int
) -> None:
    view = chunk(rows, slots, spread=3.0)
    found = seen_by(VerticalSlash(vertical=vertical, slash=slash).index(view), view)
    assert torch.equal(found, expected(view, vertical, slash))


@pytest.mark.parametrize("seed", range(8))
def test_lines_become_runs_and_columns_that_cover_them_once(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    view = chunk(30, 90, d=4, kv_heads=1, group=2)
    rows = row_blocks(view, 8)
    chosen = torch.rand(2, 90, generator=rng) < 0.1
    columns = torch.rand(2, 90, generator=rng).topk(12).indices.sort(-1).values
    slashes = slashes_of(chosen, 8)
    runs, singles = runs_of(rows, slashes), columns_of(rows, columns, slashes)
    for head in range(2):
        for block, (first, last) in enumerate(zip(rows.first.tolist(), rows.last.tolist(), strict=True)):
            begin, count = int(runs.begins[head, block]), int(runs.counts[head, block])
            keys = [
                key
                for start, _, length in runs.values[begin : begin + count].tolist()
                for key in range(start, start + length)
            ]
            offsets = chosen[head].nonzero().flatten().tolist()
            lines = {row - offset for row in range(first, first + 8) for offset in offsets}
            lines &= set(range(last + 1))
            assert keys == sorted(lines)
            begin, count = int(singles.begins[head, block]), int(singles.counts[head, block])
            rest = [key for key in columns[head].tolist() if key < first and key not in lines]
            assert singles.values[begin : begin + count].tolist() == rest


def test_a_probe_of_more_rows_is_the_sum_of_its_parts() -> None:
    view = chunk(130, 300)
    found = probe(view, 128)
    for head in range(4):
        vertical, slash = sums(view, head, 128)
        torch.testing.assert_close(found.vertical[head].double(), vertical, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.slash[head].double(), slash, atol=1e-4, rtol=0)


def test_a_probe_ends_where_rows_do_not_follow_each_other() -> None:
    assert last_rows(chunk(130, 300), 64) == 64
    assert last_rows(chunk(5, 300), 64) == 5
    assert last_rows(chunk([1, 2, 3, 10, 11], 300), 64) == 2
    assert last_rows(chunk([1, 2, 3, 10], 300), 64) == 1
    view = chunk(range(200, 260), 300)
    found = probe(view, 60)
    vertical, slash = sums(view, 1, 60)
    assert found.vertical.shape[1] == 260
    torch.testing.assert_close(found.vertical[1].double(), vertical[:260], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.slash[1].double(), slash[:260], atol=1e-4, rtol=0)


def test_a_planted_line_is_found() -> None:
    view = chunk(256, 1024, kv_heads=1, group=1, spread=0.5)
    # all rows look for what slot 333 has
    view.keys[333] = 8 * view.keys[333] / view.keys[333].norm()
    view.queries[:, 0] += view.keys[333] / 2
    seen = seen_by(VerticalSlash(vertical=31, slash=101).index(view), view)[0]
    assert bool(seen[:, 333].all())
    assert float(seen.float().mean()) < 0.4
