"""Decodes over quantized pages, on a CPU and as a GPU does it, beside a prompt in pages of floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.backend import decoding_for
from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.quantized import CpuDecoding, Decoding, PageDecoding, QuantizedAttention
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.kv_codec import cpu
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kernels.paged_decode import cpu_quantized
from mmserve.kv.codec import quantized, restored
from mmserve.kv.quantized import QuantizedStore
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.fused import Rotation
from tests.kernels import bf16_shim

bf16_shim.install()
LAYERS, KV_HEADS, GROUP, SIZE, D, PROMPT = 2, 2, 2, 16, 16, 5


class Path(NamedTuple):
    decoding: type[Decoding]
    beside: type[PagedAttention]
    kernels: str


PATHS = {
    "cpu": Path(CpuDecoding, CpuAttention, "auto"),
    "torch": Path(CpuDecoding, CpuAttention, "naive"),
    "pages": Path(PageDecoding, CudaAttention, "naive"),
    "interpreted": Path(PageDecoding, CudaAttention, "interpret"),
}


# the interpreter is slow, and prompts have tests of their own
CASES = [(name, with_prompt) for name in PATHS for with_prompt in (False, True)][:-1]


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    """What a test loads depends on its environment."""
    for kernel in (cpu._kernel, cpu_quantized._kernel):
        kernel.cache_clear()
    yield
    for kernel in (cpu._kernel, cpu_quantized._kernel):
        kernel.cache_clear()


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answers(kind: Kind) -> QuantizedStore:
    """Two sequences, one of which has lost different slots in its heads, with the slot of a step appended."""
    store = QuantizedStore(kind, PageTable(LAYERS, KV_HEADS, 60, SIZE), 3, D, torch.float32)
    for seed, (name, slots) in enumerate({"a": 50, "b": 16}.items()):
        table, floats = PageTable(LAYERS, KV_HEADS, 40, SIZE), PageStore(40, SIZE, D)
        order = np.arange(slots, dtype=np.int32)
        where = table.append(name, order, order)
        floats.write(where, rows(seed, *where.shape, D), rows(seed + 7, *where.shape, D))
        if name == "a":
            for (layer, head), count in {(0, 1): 33, (1, 0): 3, (1, 1): 48}.items():
                floats.copy(*table.keep(name, layer, head, np.arange(50 - count, 50)))
        store.import_(name, quantized(table, floats, name, kind), 0)
        store.append(name, np.array([slots], np.int32), np.array([slots], np.int32))
    return store


def prompt(path: Path) -> PagedAttention:
    table, floats = PageTable(LAYERS, KV_HEADS, 40, SIZE), PageStore(40, SIZE, D)
    order = np.arange(PROMPT, dtype=np.int32)
    table.append("p", order, order)
    return path.beside(table, floats, [SequenceRows("p", 0, PROMPT)], {"p": range(1, 3)})


def expected_decode(store: QuantizedStore, name: str, layer: int, q: Tensor) -> Tensor:
    """Dense attention of one row q [Hq, d] over what the pages read as."""
    export = restored(store.export(name))
    counts = export.lengths.reshape(-1).tolist()
    heads = slice(layer * KV_HEADS, (layer + 1) * KV_HEADS)
    outs = []
    for head, (k, v) in enumerate(
        zip(export.k.split(counts)[heads], export.v.split(counts)[heads], strict=True)
    ):
        grouped = q[head * GROUP : (head + 1) * GROUP]
        outs.append(torch.softmax(grouped @ k.T * D**-0.5, -1) @ v)
    return torch.cat(outs)


@pytest.mark.parametrize(("name", "with_prompt"), CASES)
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rows_attend_to_all_that_their_pages_hold(
    name: str, kind: Kind, with_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = PATHS[name]
    monkeypatch.setenv(VARIABLE, path.kernels)
    store, alone = answers(kind), prompt(path)
    attention = QuantizedAttention(store, ["a", "b"], prompt(path) if with_prompt else None, path.decoding)
    count = 2 + PROMPT * with_prompt
    for layer in range(LAYERS):
        q, k, v = (rows(layer + 10 * part, count, heads, D) for part, heads in enumerate((4, 2, 2)))
        out = attention.attend(layer, q, k, v)
        for row, sequence in enumerate(("a", "b")):
            expected = expected_decode(store, sequence, layer, q[row])
            torch.testing.assert_close(out[row], expected, rtol=1e-3, atol=1e-3)
        if with_prompt:
            torch.testing.assert_close(out[2:], alone.attend(layer, q[2:], k[2:], v[2:]))
            assert torch.equal(attention.observed["p"][layer], q[3:5])


@pytest.mark.parametrize("with_prompt", [False, True])
def test_products_give_what_rotated_rows_give(monkeypatch: pytest.MonkeyPatch, with_prompt: bool) -> None:
    path = PATHS["pages"]
    monkeypatch.setenv(VARIABLE, path.kernels)
    stores = answers("int8"), answers("int8")
    plain, fused = (
        QuantizedAttention(store, ["a", "b"], prompt(path) if with_prompt else None, path.decoding)
        for store in stores
    )
    assert fused.is_fused
    count = 2 + PROMPT * with_prompt
    # at place 0 nothing turns
    rotation = Rotation(torch.zeros(count, dtype=torch.int32), rows(3, D // 2), None, None, 1e-6)
    for layer in range(LAYERS):
        qkv = rows(layer, count, 8, D)
        found = fused.attend_products(layer, qkv, rotation)
        torch.testing.assert_close(found, plain.attend(layer, *qkv.split((4, 2, 2), dim=1)))


def test_every_device_has_its_decoding() -> None:
    assert decoding_for(torch.device("cpu")) is CpuDecoding
    assert decoding_for(torch.device("cuda")) is PageDecoding
