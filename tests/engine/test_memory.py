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


@pytest.mark.parametrize("kv_dtype", ["auto", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("prefills", "decodes"), [(True, True), (True, False), (False, True)])
def test_too_little_memory_says_how_much_is_enough(kv_dtype: str, prefills: bool, decodes: bool) -> None:
    with pytest.raises(ConfigError, match="a page of every head") as refusal:
        runner(kv_dtype, memory=100, prefills=prefills, decodes=decodes)
    least = int(refusal.value.public_message.split("at least ")[1].split()[0])
    made = runner(kv_dtype, memory=least, prefills=prefills, decodes=decodes)
    assert made.most_pages >= made.table.layers * made.table.kv_heads
    with pytest.raises(ConfigError):
        runner(kv_dtype, memory=least - 1, prefills=prefills, decodes=decodes)


def test_a_deployment_that_keeps_less_has_places_for_more() -> None:
    def places(kv_budget: float | None) -> int:
        return make_runner(
            tiny_decoder(),
            kv_dtype="int4",
            memory=MEMORY,
            page_size=32,
            dtype=torch.float32,
            device="cpu",
            prefills=False,
            decodes=True,
            kv_budget=kv_budget,
        ).places

    assert places(1.0) < places(0.25) == places(None) == places(768.0) < places(0.05)
    assert places(1.0) == places(5000.0)
