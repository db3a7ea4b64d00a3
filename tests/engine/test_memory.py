"""Who gets how many pages of which type."""

from __future__ import annotations

import pytest
import torch

from mmserve.engine.memory import make_runner
from mmserve.engine.quantized import QuantizedRunner
from mmserve.engine.runner import Runner
from mmserve.errors import ConfigError
from tests.workers.fakes import tiny_decoder

MEMORY = 1 << 20


def runner(kv_dtype: str, *, prefills: bool = True, decodes: bool = True, memory: int = MEMORY) -> Runner:
    return make_runner(
        tiny_decoder(),
        kv_dtype=kv_dtype,
        memory=memory,
        page_size=32,
        dtype=torch.float32,
        device="cpu",
        prefills=prefills,
        decodes=decodes,
    )


def held_bytes(made: Runner) -> int:
    taken = made.store.k.nbytes + made.store.v.nbytes
    if isinstance(made, QuantizedRunner):
        quantized = made.quantized
        taken += quantized.table.num_pages * quantized.page_bytes
        taken += quantized.newest.k.nbytes + quantized.newest.v.nbytes
    return taken


@pytest.mark.parametrize(("kv_dtype", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_pages_of_floats_have_all_memory(kv_dtype: str, dtype: torch.dtype) -> None:
    made = runner(kv_dtype)
    assert not made.has_answer_pages
    assert made.codec is None
    assert made.store.k.dtype == dtype
    assert MEMORY - made.store.page_bytes < held_bytes(made) <= MEMORY


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantized_pages_have_half_or_all_of_it(kind: str) -> None:
    prefill, decode, both = (
        runner(kind, decodes=False),
        runner(kind, prefills=False),
        runner(kind),
    )
    assert (prefill.codec, prefill.has_answer_pages) == (kind, False)
    assert MEMORY - prefill.store.page_bytes < held_bytes(prefill) <= MEMORY
    assert decode.table.num_pages == 0
    assert decode.most_pages == decode.offered_pages == decode.answers.num_pages
    for made in (decode, both):
        assert isinstance(made, QuantizedRunner)
        assert made.store.page_bytes * 2 + made.quantized.page_bytes > MEMORY - held_bytes(made) >= 0
    assert held_bytes(both) - both.table.num_pages * both.store.page_bytes <= MEMORY // 2
    assert both.table.num_pages == MEMORY // 2 // both.store.page_bytes
    assert both.most_pages == both.table.num_pages < both.answers.num_pages


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_too_little_memory_for_a_page_of_every_head_is_said(kv_dtype: str) -> None:
    with pytest.raises(ConfigError, match="a page of every head"):
        runner(kv_dtype, memory=5000)
