"""Decode attention on a CPU over quantized pages: compiled for this CPU, compiled portably, and in torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmserve.kernels import native
from mmserve.kernels.kv_codec import QuantizedPages, empty_pages, naive
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kernels.paged_decode import cpu_quantized
from mmserve.kernels.paged_decode.cpu import SOURCE

PAGES = 50
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    q: Tensor
    pages: QuantizedPages
    k: Tensor
    v: Tensor
    run_first: Tensor
    run_length: Tensor
    run_begin: Tensor
    expected: Tensor

    def attend(self) -> Tensor:
        pages, scale = self.pages, self.q.shape[2] ** -0.5
        runs = self.run_first, self.run_length, self.run_begin
        return cpu_quantized.paged_decode_quantized(
            self.q, pages.k, pages.v, pages.scales, self.k, self.v, *runs, scale=scale
        )


def make_case(kind: Kind, d: int, group: int, page_size: int, dtype: torch.dtype, counts: list[int]) -> Case:
    """Two sequences of two heads with so many quantized pages in any order, and some newest slots."""
    generator = torch.Generator().manual_seed(d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pages, ids = empty_pages(kind, PAGES, page_size, d, key_axis="channel"), torch.arange(PAGES).int()
    k, v = normal(PAGES, page_size, d), normal(PAGES, page_size, d)
    k[..., 3] *= 20
    naive.store_pages(pages, k, v, ids, torch.full_like(ids, page_size))
    read = [rows.flatten(0, 1) for rows in naive.load_pages(pages, ids)]
    newest = normal(4 * page_size, d), normal(4 * page_size, d)
    q, places = normal(2, 2 * group, d) * 0.3, torch.randperm(PAGES, generator=generator).tolist()
    firsts, lengths, begins, outs = list[int](), list[int](), [0], list[Tensor]()
    for head, count in enumerate(counts):
        own, rest = [places.pop() for _ in range(count)], 1 + head * (page_size - 1) // 3
        firsts += [page * page_size for page in own] + [(PAGES + head) * page_size]
        lengths += [page_size] * count + [rest]
        begins.append(len(firsts))
        slots = (torch.tensor(own).long()[:, None] * page_size + torch.arange(page_size)).view(-1)
        new = slice(head * page_size, head * page_size + rest)
        keys, values = (
            torch.cat([rows[slots], new_rows[new].float()])
            for rows, new_rows in zip(read, newest, strict=True)
        )
        queries = q.view(4, group, d)[head].float()
        outs.append(torch.softmax(queries @ keys.T * d**-0.5, -1) @ values)
    return Case(
        q,
        pages,
        *newest,
        torch.tensor(firsts),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(begins),
        torch.stack(outs).view(q.shape),
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
    cpu_quantized._kernel.cache_clear()
    if request.param != "torch" and cpu_quantized._kernel() is None:
        pytest.skip("no C compiler")
    yield
    cpu_quantized._kernel.cache_clear()


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("d", "group", "page_size"), [(64, 7, 32), (128, 4, 32), (72, 3, 16), (8, 1, 4), (256, 9, 20)]
)
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_it_equals_attention_over_what_the_pages_read_as(
    kind: Kind, d: int, group: int, page_size: int, dtype: torch.dtype
) -> None:
    case = make_case(kind, d, group, page_size, dtype, [19, 3, 0, 12])
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(case.attend().float(), case.expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_threads_do_not_change_a_bit(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(kind, 64, 7, 32, torch.bfloat16, [30, 2, 1, 9])
    alone = case.attend()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(case.attend(), alone)


def test_a_run_behind_the_newest_slots_is_refused() -> None:
    if cpu_quantized._kernel() is None:
        pytest.skip("no C compiler")
    case = make_case("int8", 8, 1, 4, torch.float32, [1, 1, 1, 1])
    case.run_first[-1] = (PAGES + 4) * 4
    with pytest.raises(RuntimeError, match="a run leaves the arrays"):
        case.attend()


def test_no_sequences_are_no_outputs() -> None:
    case = make_case("int4", 8, 1, 4, torch.float32, [1, 1, 1, 1])
    nothing = case._replace(q=case.q[:0], run_begin=case.run_begin[:1])
    assert nothing.attend().shape == (0, 2, 8)
