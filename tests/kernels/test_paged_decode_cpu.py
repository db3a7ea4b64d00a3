"""Decode attention on a CPU against its oracle: compiled for this CPU, compiled portably, and in torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmserve.kernels import native
from mmserve.kernels.paged_decode import cpu, naive

SOURCE = Path(cpu.__file__).with_name("cpu.c")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    run_first: Tensor
    run_length: Tensor
    run_begin: Tensor


def make_case(
    lengths: list[list[int]], *, group: int, d: int, dtype: torch.dtype, longest_run: int = 40, seed: int = 0
) -> Case:
    """Heads of these lengths [B][kv_heads] in runs of random lengths and places; all other slots are NaN."""
    generator = torch.Generator().manual_seed(seed)
    runs: list[tuple[int, int]] = []  # head, length
    for head, total in enumerate(length for row in lengths for length in row):
        while total:
            length = min(total, int(torch.randint(1, longest_run + 1, (), generator=generator)))
            runs.append((head, length))
            total -= length
    k = torch.full((sum(length + 3 for _, length in runs) + 3, d), torch.nan, dtype=dtype)
    v = k.clone()
    firsts, place = torch.zeros(len(runs), dtype=torch.int64), 3
    for run in torch.randperm(len(runs), generator=generator).tolist():
        firsts[run] = place
        for pages in (k, v):
            pages[place : place + runs[run][1]] = torch.randn(runs[run][1], d, generator=generator)
        place += runs[run][1] + 3
    counts = torch.bincount(torch.tensor([head for head, _ in runs], dtype=torch.int64))
    kv_heads = len(lengths[0]) if lengths else 2
    return Case(
        torch.randn(len(lengths), kv_heads * group, d, generator=generator).to(dtype),
        *(k, v, firsts),
        torch.tensor([length for _, length in runs], dtype=torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    )


@pytest.fixture(params=["compiled", "portable", "torch"])
def _path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The same function over each of its three ways of computing."""
    monkeypatch.setenv("MMSERVE_KERNELS", "naive" if request.param == "torch" else "auto")
    if request.param == "portable":
        portable = tmp_path_factory.getbasetemp() / "portable" / "cpu.c"
        shutil.copytree(SOURCE.parent, portable.parent, dirs_exist_ok=True)
        portable.write_text("#undef __AVX512BF16__\n" + SOURCE.read_text())
        original = native.load
        monkeypatch.setattr(native, "load", lambda source: original(portable))
    cpu._kernel.cache_clear()
    if request.param != "torch" and cpu._kernel() is None:
        pytest.skip("no C compiler")
    yield
    cpu._kernel.cache_clear()


def check(case: Case) -> None:
    scale = case.q.shape[-1] ** -0.5
    out = torch.full_like(case.q, torch.nan)
    assert cpu.paged_decode(*case, scale=scale, out=out) is out
    expected = naive.paged_decode(*case, scale=scale)
    tolerance = TOLERANCES[case.q.dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("_path")
class TestEveryPath:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("d", [64, 72, 128])
    @pytest.mark.parametrize("group", [1, 4, 7])
    def test_it_equals_the_oracle(self, group: int, d: int, dtype: torch.dtype) -> None:
        check(make_case([[1, 130], [513, 2], [127, 1025], [64, 7], [33, 512]], group=group, d=d, dtype=dtype))

    @pytest.mark.parametrize(
        ("group", "d"), [(2, 8), (3, 40), (5, 24), (6, 256), (8, 80), (9, 64), (16, 256), (17, 16), (2, 20)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_unusual_shapes_equal_the_oracle(self, group: int, d: int, dtype: torch.dtype) -> None:
        check(make_case([[77, 3, 600]], group=group, d=d, dtype=dtype, longest_run=1))

    @pytest.mark.parametrize("lengths", range(1, 18))
    def test_every_length_around_the_vector_width(self, lengths: int) -> None:
        check(make_case([[lengths]], group=7, d=64, dtype=torch.bfloat16, longest_run=3, seed=lengths))

    def test_an_empty_batch_is_an_empty_output(self) -> None:
        case = make_case([], group=4, d=64, dtype=torch.float32)
        assert cpu.paged_decode(*case, scale=0.125).shape == (0, 8, 64)

    def test_an_empty_run_is_skipped(self) -> None:
        case = make_case([[600]], group=4, d=64, dtype=torch.float32, longest_run=600)
        zero = torch.zeros(1, dtype=torch.int64)
        first = torch.cat([zero, case.run_first, zero])
        length = torch.cat([zero.int(), case.run_length, zero.int()])
        begin = torch.tensor([0, len(first)])
        check(case._replace(run_first=first, run_length=length, run_begin=begin))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_scores_far_apart_neither_overflow_nor_vanish(self, dtype: torch.dtype) -> None:
        case = make_case([[900, 40]], group=7, d=64, dtype=dtype)
        case.q.mul_(300)
        check(case)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_a_nan_is_passed_on_to_its_head_only(self, dtype: torch.dtype) -> None:
        case = make_case([[700, 40]], group=7, d=64, dtype=dtype)
        case.k[case.run_first[5]] = torch.nan
        out = cpu.paged_decode(*case, scale=0.125)
        assert out[0, :7].isnan().all()
        assert not out[0, 7:].isnan().any()

    def test_it_never_sees_slots_of_other_heads(self) -> None:
        case = make_case([[40, 41], [42, 43]], group=4, d=64, dtype=torch.float32)
        before = cpu.paged_decode(*case, scale=0.125)
        for run in range(int(case.run_begin[1])):
            first, length = int(case.run_first[run]), int(case.run_length[run])
            case.k[first : first + length] = torch.nan
            case.v[first : first + length] = torch.nan
        after = cpu.paged_decode(*case, scale=0.125)
        torch.testing.assert_close(after.flatten(0, 1)[4:], before.flatten(0, 1)[4:], rtol=0, atol=0)


@pytest.fixture
def _compiled() -> None:
    if cpu._kernel() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_runs_and_neighbours_do_not_change_a_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([[1300, 700], [5, 900]], group=7, d=64, dtype=dtype)
    together = cpu.paged_decode(*case, scale=0.125)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(cpu.paged_decode(*case, scale=0.125), together, rtol=0, atol=0)
    # the second sequence alone, its slots one after the other
    begins = case.run_begin.tolist()
    rows: list[Tensor] = []
    for run in range(begins[2], begins[4]):
        first, length = int(case.run_first[run]), int(case.run_length[run])
        rows.append(torch.arange(first, first + length))
    slots = torch.cat(rows)
    alone = cpu.paged_decode(
        case.q[1:].contiguous(),
        *(case.k[slots], case.v[slots]),
        torch.tensor([0, 5]),
        torch.tensor([5, 900], dtype=torch.int32),
        torch.tensor([0, 1, 2]),
        scale=0.125,
    )
    torch.testing.assert_close(alone, together[1:], rtol=0, atol=0)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("first", "length"), [(-1, 4), (7, 4), (2**62, 4), (0, -1), (0, 0)])
def test_runs_outside_the_arrays_are_refused(first: int, length: int) -> None:
    with pytest.raises(RuntimeError, match="a run leaves the arrays"):
        cpu.paged_decode(
            *(torch.zeros(1, 1, 64), torch.zeros(10, 64), torch.zeros(10, 64)),
            torch.tensor([first]),
            torch.tensor([length], dtype=torch.int32),
            torch.tensor([0, 1]),
            scale=1.0,
        )
