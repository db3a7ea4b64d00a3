"""What serving launches on a GPU, recorded on a CPU, is what the tests compile ahead of time."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mmserve.attention import cuda
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import SequenceRows
from mmserve.attention.quantized import PageDecoding, QuantizedAttention
from mmserve.bench.geometry import geometry
from mmserve.engine.graphs import DecodeGraphs
from mmserve.kernels.aot import SHARED_LIMIT
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.kv_codec.pages import PAGE_TYPES, Kind
from mmserve.kernels.prefill_attention import triton as prefill
from mmserve.kv.codec import quantized
from mmserve.kv.quantized import QuantizedStore
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import fused_forward
from mmserve.models.loader import load_checkpoint
from tests.attention.served_variants import MODELS, Model, model_variants, quantized_variants, served_variants
from tests.kernels.aot_variants import POINTER, Variant
from tests.workers.fakes import tiny_decoder


class Launch(NamedTuple):
    """One kernel as it is compiled."""

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: object
    num_stages: object


def launch(
    kernel: Any,  # noqa: ANN401  # compiled or interpreted
    arguments: dict[str, str],
    constants: dict[str, object],
    num_warps: object,
    num_stages: object,
) -> Launch:
    types, fixed = tuple(sorted(arguments.items())), tuple(sorted(constants.items()))
    return Launch(kernel.__name__, types, fixed, num_warps, num_stages)


def launch_of(variant: Variant) -> Launch:
    return launch(*variant[1:6])


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return POINTER[value.dtype]
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{POINTER[value.base.dtype][1:]}[{shape}]>"
    return {int: "i32", float: "fp32"}[type(value)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """Every launch from now on, none of which happens."""
    found: set[Launch] = set()

    def recorded(self: InterpretedFunction, *args: object, **kwargs: object) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, args, strict=False)) | kwargs
        constants = {
            name: given[name]
            for name, parameter in parameters.items()
            if "constexpr" in str(parameter.annotation) or given[name] is None
        }
        types = {name: type_of(given[name]) for name in parameters if name not in constants}
        warps, stages = kwargs.get("num_warps", 4), kwargs.get("num_stages", 3)
        found.add(launch(self, types, constants, warps, stages))

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    return found


def make_decoder(model: Model) -> TextDecoder:
    """One layer whose attention and norms have the model's sizes; its weights are zeros."""
    config = replace(
        tiny_decoder().config,
        layers=1,
        hidden_size=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.d,
        qk_norm=model.qk_norm,
    )
    with torch.device("meta"):
        decoder = TextDecoder(config)
    decoder = decoder.to_empty(device="cpu").to(model.dtype).requires_grad_(False)
    for weight in decoder.parameters():
        weight.zero_()
    return decoder


def serve(model: Model) -> None:
    """Prompts, decodes as a graph and beside a chunk, with pages in one run and in several, and carriers."""
    decoder = make_decoder(model)
    table = PageTable(1, model.kv_heads, 200)
    store = PageStore(200, table.page_size, model.d, model.dtype)
    places = {"a": 0, "b": 0, "c": 0}
    # the first row of this one is not seen from the third on
    until = {"c": np.array([2, *[np.iinfo(np.int32).max] * 5], np.int32)}

    def step(**counts: int) -> None:
        batch, start = [], 0
        for name, count in counts.items():
            orders = np.arange(places[name], places[name] + count, dtype=np.int32)
            table.append(name, orders, orders)
            places[name] += count
            batch.append(SequenceRows(name, start, start + count, until.get(name)))
            start += count
        positions = np.concatenate([np.arange(places[name] - n, places[name]) for name, n in counts.items()])
        attention = CudaAttention(table, store, batch)
        x = torch.zeros(start, model.hidden, dtype=model.dtype)
        fused_forward(decoder, x, torch.from_numpy(positions.astype(np.int32)), attention.attend_products)

    step(a=3)
    step(b=2)
    # the pages beside its own are taken
    step(a=table.page_size)
    step(b=1, a=2)
    step(c=6)
    order = np.array([places["b"]], np.int32)
    table.append("b", order, order)
    DecodeGraphs(decoder, table, store, capture=lambda step: step).run(["b"], [1], order)


@torch.inference_mode()
@pytest.mark.parametrize("chip", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in MODELS), ("tiny", torch.float16)]
)
def test_serving_launches_these_variants_and_no_others(
    name: str, dtype: torch.dtype, chip: int, launches: set[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]._replace(dtype=dtype)
    monkeypatch.setenv(VARIABLE, "interpret")
    monkeypatch.setattr(prefill, "_capability", lambda device: chip)
    for splits in (1, 2):
        monkeypatch.setattr(cuda, "INTERPRETED_SPLITS", splits)
        serve(model)
    assert launches == {launch_of(variant) for variant in model_variants(name, model, chip)}


def answer(model: Model, kind: Kind) -> None:
    """An answer in quantized pages, one of which fills up."""
    decoder = make_decoder(model)
    table, floats = PageTable(1, model.kv_heads, 20), PageStore(20, 32, model.d, model.dtype)
    order = np.arange(64, dtype=np.int32)
    table.append("a", order, order)
    store = QuantizedStore(kind, PageTable(1, model.kv_heads, 20), 1, model.d, model.dtype)
    store.import_("a", quantized(table, floats, "a", kind), 0)
    order = np.array([64], np.int32)
    store.append("a", order, order)
    attention = QuantizedAttention(store, ["a"], None, PageDecoding)
    x = torch.zeros(1, model.hidden, dtype=model.dtype)
    fused_forward(decoder, x, torch.from_numpy(order), attention.attend_products)


@torch.inference_mode()
@pytest.mark.parametrize("kind", PAGE_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_quantized_pages_launch_these_variants_besides(
    name: str, kind: Kind, launches: set[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pages = MODELS[name], PAGE_TYPES[kind]
    monkeypatch.setenv(VARIABLE, "interpret")
    for splits in (1, 2):
        monkeypatch.setattr(cuda, "INTERPRETED_SPLITS", splits)
        answer(model, kind)
    others = {launch_of(variant) for variant in model_variants(name, model, 90)}
    assert launches - others == {launch_of(variant) for variant in quantized_variants(name, model, pages)}
    if name == "tiny":
        assert launches <= {launch_of(variant) for variant in served_variants(90)}


def test_models_have_the_sizes_of_their_configurations() -> None:
    tiny = load_checkpoint("tiny").text
    assert MODELS["tiny"][:4] == (tiny.hidden_size, tiny.heads, tiny.kv_heads, tiny.head_dim)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in ("ov-0.5b", "ov-7b"):
        assert MODELS[name][:4] == tuple(geometry(name).text[size] for size in names)


def test_every_variant_of_a_model_is_compiled() -> None:
    compiled = {launch_of(variant) for variant in served_variants(90)}
    for name, model in MODELS.items():
        assert {launch_of(variant) for variant in model_variants(name, model, 90)} <= compiled
