"""The language handler with quantized pages: hand-off, growth, preemption, credits, what is reported."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmserve import messages as m
from mmserve.engine.quantized import QuantizedRunner
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.request import Methods
from mmserve.sampling import SamplingParams
from tests.workers.fakes import BOTH, IMAGE, VIDEO, Engine

LONG = SamplingParams(max_tokens=14, ignore_eos=True)
MIXED = (1, 2, VIDEO, 3, IMAGE, 4, 5)
KINDS: list[Kind] = ["int8", "int4", "fp8"]


def mixed(engine: Engine) -> tuple[m.PromptItem, ...]:
    return engine.item(9, [0, 2, 3, 8], seed=1), engine.item(5, seed=2)


def free_places(engine: Engine) -> int:
    assert isinstance(engine.runner, QuantizedRunner)
    return engine.runner.quantized.free_places


def handed_off(directory: Path, kind: Kind | None, kv: str = "none") -> tuple[Engine, m.PromptPrefilled]:
    prefill = Engine(directory, roles=BOTH[:1], codec=kind)
    methods = Methods(kv=kv, kv_budget=0.4)
    prefill.prefill("r", MIXED, mixed(prefill), sampling=LONG, methods=methods, hand_off=True)
    prefill.run()
    (event,) = prefill.reporter.of(m.PromptPrefilled)
    assert prefill.used_pages == 0
    return prefill, event


@pytest.mark.parametrize("kv", ["none", "snapkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_here_and_decode_there_equals_one_worker(tmp_path: Path, kind: Kind, kv: str) -> None:
    together = Engine(tmp_path, codec=kind)
    together.prefill("r", MIXED, mixed(together), sampling=LONG, methods=Methods(kv=kv, kv_budget=0.4))
    together.finish()
    assert len(together.answer("r")) == 14
    assert together.used_pages == 0
    assert free_places(together) == 64
    together.check()
    prefill, event = handed_off(tmp_path, kind, kv)
    assert event.lease is not None
    decode = Engine(tmp_path, roles=BOTH[1:], codec=kind)
    assert decode.runner.table.num_pages == 0
    assert decode.handler.credits() == decode.handler.capacity
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert prefill.answer("r") + decode.answer("r") == together.answer("r")
    assert decode.used_pages == 0
    (there,) = together.reporter.of(m.PromptPrefilled)
    assert (event.slots, event.kv_bytes) == (there.slots, there.kv_bytes)
    assert event.kv_bytes < event.kv_bytes_uncompressed / (2 if kind == "int4" else 1.5)


@pytest.mark.parametrize(
    ("here", "there"), [("int4", "int8"), ("int8", "int4"), (None, "fp8"), ("int8", None)]
)
def test_a_decode_worker_may_use_another_codec(tmp_path: Path, here: Kind | None, there: Kind | None) -> None:
    prefill, event = handed_off(tmp_path, here)
    decode = Engine(tmp_path, roles=BOTH[1:], codec=there)
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert not decode.reporter.of(m.RequestFailed)
    assert len(decode.answer("r")) == 13
    assert decode.used_pages == 0
    decode.check()


def test_int8_answers_as_floats_do(tmp_path: Path) -> None:
    """Of prompts whose choices are not close."""
    engines = Engine(tmp_path), Engine(tmp_path, codec="int8")
    same, prompts = 0, [tuple(random.Random(seed).choices(range(45), k=5 + 3 * seed)) for seed in range(12)]
    for engine in engines:
        for number, prompt in enumerate(prompts):
            engine.prefill(f"r{number}", prompt, sampling=SamplingParams(max_tokens=8, ignore_eos=True))
        engine.finish()
    for number in range(len(prompts)):
        same += engines[0].answer(f"r{number}") == engines[1].answer(f"r{number}")
    assert same >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_preempted_answers_the_same_in_the_end(tmp_path: Path, kind: Kind) -> None:
    """Pages for less than two long answers: some wait, some give way, all end."""
    prompts = {f"r{number}": (number, 2, 3, 4, 5) for number in range(5)}
    sampling = SamplingParams(max_tokens=90, ignore_eos=True)
    alone = {}
    for name, prompt in prompts.items():
        engine = Engine(tmp_path, codec=kind)
        engine.prefill(name, prompt, sampling=sampling)
        engine.finish()
        alone[name] = engine.answer(name)
    crowd = Engine(tmp_path, codec=kind, pages=180)
    for name, prompt in prompts.items():
        crowd.prefill(name, prompt, sampling=sampling)
    seen = preempted = 0
    for _ in range(3000):
        busy = crowd.handler.step()
        for event in crowd.reporter.events[seen:]:
            if isinstance(event, m.PromptPrefilled):
                crowd.handler.handle(crowd.continuation(event))
            elif isinstance(event, m.RequestPreempted):
                preempted += 1
                known = tuple(crowd.answer(event.request_id))
                crowd.prefill(event.request_id, prompts[event.request_id], sampling=sampling, forced=known)
        if not busy and seen == len(crowd.reporter.events):
            break
        seen = len(crowd.reporter.events)
    crowd.check()
    assert preempted > 0
    assert {name: crowd.answer(name) for name in prompts} == alone
    assert crowd.used_pages == 0
    assert free_places(crowd) == 64


@pytest.mark.parametrize("steps", range(9))
def test_cancel_in_every_state_frees_all_pages(tmp_path: Path, steps: int) -> None:
    engine = Engine(tmp_path, token_budget=4, codec="int4")
    engine.prefill("gone", MIXED, mixed(engine), methods=Methods(kv="snapkv"))
    for _ in range(steps):
        engine.handler.step()
        for event in engine.reporter.of(m.PromptPrefilled):
            engine.handler.handle(engine.continuation(event))
        engine.reporter.events.clear()
    engine.handler.handle(m.CancelRequest(request_id="gone"))
    assert engine.used_pages == 0
    assert free_places(engine) == 64
    assert engine.handler.credits() == engine.handler.capacity
    engine.check()


def test_no_more_run_than_have_places(tmp_path: Path) -> None:
    engine = Engine(tmp_path, codec="int8", places=2)
    assert engine.handler.capacity.requests == 2
    for number in range(5):
        engine.prefill(f"r{number}", (number, 2, 3), sampling=LONG)
    engine.finish()
    assert all(len(engine.answer(f"r{number}")) == 14 for number in range(5))
    assert free_places(engine) == 2


def test_the_next_turn_begins_with_the_prompt_in_floats(tmp_path: Path) -> None:
    engine, prompt = Engine(tmp_path, codec="int4"), tuple(range(1, 30))
    for name in ("first", "second"):
        engine.prefill(name, prompt, sampling=LONG)
        engine.finish()
    first, second = engine.reporter.of(m.PromptPrefilled)
    assert (first.cached_slots, second.cached_slots) == (0, 28)
    assert engine.answer("first") == engine.answer("second")
