"""`prune carriers` on the language side: one KV slot per frame, and the answers of one pass with the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmserve import messages as m
from mmserve.attention.cuda import CudaAttention
from mmserve.engine.batch import StepResult
from mmserve.engine.rows import DecodeRow
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Plan
from mmserve.kernels.dispatch import VARIABLE
from mmserve.pruning.carriers import FOREVER
from mmserve.request import Methods
from mmserve.sampling import SamplingParams
from tests.workers.carried import (
    CARRIERS,
    LIMITED,
    MEMORY,
    Carried,
    Clip,
    limited_until,
    plain,
    prompts,
    text,
)
from tests.workers.fakes import BOTH, VIDEO, Engine

SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
PROMPTS = prompts()
every_prompt = pytest.mark.parametrize("name", sorted(PROMPTS))


def ask(
    engine: Engine,
    prompt: Carried,
    name: str = "r",
    *,
    methods: Methods = CARRIERS,
    hand_off: bool = False,
) -> None:
    items = prompt.items(engine)
    if methods.prune != "carriers":
        items = tuple(map(plain, items))
    engine.prefill(name, prompt.token_ids, items, sampling=SAMPLING, methods=methods, hand_off=hand_off)


def prefilled(engine: Engine, name: str = "r") -> m.PromptPrefilled:
    (event,) = [one for one in engine.reporter.of(m.PromptPrefilled) if one.request_id == name]
    return event


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Prompt rows that went through the model, by request."""
    seen: dict[str, int] = {}
    run = Runner.run

    def watched(runner: Runner, plan: Plan, decodes: dict[str, DecodeRow]) -> StepResult:
        for chunk in plan.chunks:
            seen[chunk.sequence] = seen.get(chunk.sequence, 0) + chunk.stop - chunk.start
        return run(runner, plan, decodes)

    monkeypatch.setattr(Runner, "run", watched)
    return seen


@every_prompt
@pytest.mark.parametrize("budget", [1, 7, 64, 2048])
def test_answers_are_those_of_one_pass_with_the_mask(tmp_path: Path, name: str, budget: int) -> None:
    engine, prompt = Engine(tmp_path, token_budget=budget), PROMPTS[name]
    ask(engine, prompt)
    engine.finish()
    said, logits = prompt.answer(6)
    assert engine.answer("r") == said
    event = prefilled(engine)
    assert event.first is not None
    assert event.first.logprobs is not None
    assert event.first.logprobs[said[0]].logprob == pytest.approx(
        float(logits.log_softmax(-1)[said[0]]), abs=1e-4
    )
    tokens = len(prompt.frame)
    assert (event.slots, event.next_order, event.next_position) == (prompt.lasting, tokens, tokens)
    assert event.kv_bytes_uncompressed * prompt.lasting == event.kv_bytes * tokens
    expected = sum(clip.frames + 1 if clip.frames else clip.size for clip in prompt.clips)
    assert event.visual_lasting == expected
    assert engine.used_pages == 0
    engine.check()


@every_prompt
@pytest.mark.parametrize("budget", [7, 2048])
def test_the_path_of_a_gpu_gives_the_same(
    tmp_path: Path, name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "naive")
    engine, prompt = Engine(tmp_path, token_budget=budget), PROMPTS[name]
    engine.runner.attention = CudaAttention
    ask(engine, prompt)
    engine.finish()
    assert engine.answer("r") == prompt.answer(6)[0]


def test_the_mask_matters_to_the_model_of_these_tests() -> None:
    prompt = PROMPTS["sixteen frames"]
    plain = Carried(prompt.token_ids, (Clip(0, 16 * 9 + 1, 3),))
    _, masked = prompt.answer(1)
    rows = torch.cat([clip.embeddings for clip in prompt.clips])
    assert torch.equal(rows[:-1], plain.clips[0].embeddings[:-1])
    _, whole = Carried((*prompt.token_ids[:2], 50, *prompt.token_ids[3:]), plain.clips).answer(1)
    assert (masked.log_softmax(-1) - whole.log_softmax(-1)).abs().max() > 0.1


@pytest.mark.parametrize("budget", [7, 2048])
def test_a_second_question_about_a_video_begins_behind_it(
    tmp_path: Path, budget: int, rows_run: dict[str, int]
) -> None:
    engine, clip = Engine(tmp_path, token_budget=budget), Clip(20, 9, 1)
    first, second = (Carried((*text(4), VIDEO, *text(6, seed)), (clip,)) for seed in (1, 2))
    ask(engine, first, "first")
    engine.finish()
    ask(engine, second, "second")
    engine.finish()
    assert rows_run["first"] == 4 + 20 * 9 + 1 + 6
    # 4 + 20 slots are whole pages
    assert prefilled(engine, "second").cached_slots == 24
    assert rows_run["second"] == 1 + 6
    assert engine.answer("second") == second.answer(6)[0]
    ask(engine, first, "plain", methods=Methods())
    engine.finish()
    assert prefilled(engine, "plain").cached_slots == 0, "another method, other KV"
    engine.check()


def test_questions_that_come_together_wait_for_one_prefill_of_their_video(
    tmp_path: Path, rows_run: dict[str, int]
) -> None:
    engine, clip = Engine(tmp_path, token_budget=16), Clip(20, 9, 1)
    asked = {f"q{seed}": Carried((*text(4), VIDEO, *text(6, seed)), (clip,)) for seed in range(3)}
    for name, prompt in asked.items():
        ask(engine, prompt, name)
    engine.finish()
    assert [rows_run[name] for name in asked] == [191, 7, 7]
    assert all(engine.answer(name) == prompt.answer(6)[0] for name, prompt in asked.items())


def test_the_next_turn_begins_behind_the_answer(tmp_path: Path, rows_run: dict[str, int]) -> None:
    engine, clip = Engine(tmp_path), Clip(20, 9, 1)
    first = Carried((*text(4), VIDEO, *text(6, 1)), (clip,))
    ask(engine, first, "first")
    engine.finish()
    answer = tuple(engine.answer("first"))
    second = Carried((*first.token_ids, *answer, *text(5, 2)), (clip,))
    ask(engine, second, "second")
    engine.finish()
    # 4 + 21 + 6 slots, and 5 of the answer, whose last token was never fed
    assert prefilled(engine, "second").cached_slots == 36
    assert rows_run["second"] == 6
    assert engine.answer("second") == second.answer(6)[0]


@pytest.mark.parametrize("budget", [7, 64])
def test_pages_are_for_what_lasts_and_one_step(tmp_path: Path, budget: int) -> None:
    """Half a page pool of the raw tokens is enough for the prompt, and the rest is free meanwhile."""
    prompt = Carried((*text(4), VIDEO, *text(6, 1)), (Clip(64, 16, 1),))
    most = prompt.lasting + budget + 16 + 6  # a step, a frame that has begun, and the answer
    pages = 4 * -(-most // 4)
    engine = Engine(tmp_path, pages=pages, token_budget=budget)
    assert engine.table.pages_for(len(prompt.frame)) > 4 * pages
    ask(engine, prompt)
    engine.finish()
    assert engine.answer("r") == prompt.answer(6)[0]
    engine.check()


@pytest.mark.parametrize("size", [1, 4, 32])
def test_kv_grows_with_frames_and_not_with_their_tokens(tmp_path: Path, size: int) -> None:
    found = []
    for frames in (32, 128, 512):
        engine = Engine(tmp_path, pages=4000, token_budget=64)
        ask(engine, Carried((1, VIDEO, 2), (Clip(frames, size, 1, 64),)), hand_off=True)
        held = 0
        while engine.handler.step():
            held = max(held, engine.table.used_pages)
        found.append((prefilled(engine).slots, held))
    assert [slots for slots, _ in found] == [frames + 3 for frames in (32, 128, 512)]
    # what lasts, a step and a frame
    assert all(held <= 4 * -(-(slots + 64 + size) // 4) for slots, held in found)


@pytest.mark.parametrize("kv", ["none", "snapkv", "random"])
def test_prefill_here_and_decode_there_equals_one_worker(tmp_path: Path, kv: str) -> None:
    methods, prompt = Methods(prune="carriers", kv=kv, kv_budget=0.5), PROMPTS["sixteen frames"]
    together = Engine(tmp_path)
    ask(together, prompt, methods=methods)
    together.finish()
    prefill, decode = Engine(tmp_path, roles=BOTH[:1]), Engine(tmp_path, roles=BOTH[1:])
    ask(prefill, prompt, methods=methods, hand_off=True)
    prefill.run()
    event = prefilled(prefill)
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert prefill.answer("r") + decode.answer("r") == together.answer("r")
    # half of 17 visual slots
    assert event.slots == prompt.lasting - (0 if kv == "none" else 9)
    assert prefill.used_pages == decode.used_pages == 0


@pytest.mark.parametrize("budget", [1, 7, 2048])
@pytest.mark.parametrize("kv", ["snapkv", "h2o", "look_m", "laq", "kvzip"])
def test_a_policy_after_it_chooses_among_what_is_left(tmp_path: Path, budget: int, kv: str) -> None:
    prompt, found = PROMPTS["two videos"], []
    for rows in (2048, budget):
        engine = Engine(tmp_path, token_budget=rows)
        ask(engine, prompt, methods=Methods(prune="carriers", kv=kv, kv_budget=0.4))
        engine.finish()
        found.append(engine.answer("r"))
        if kv != "kvzip":  # which gives one head more than another
            assert prefilled(engine).slots == prompt.lasting - 11 + 4
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", [1, 7, 2048])
@pytest.mark.parametrize("kv", ["none", "snapkv"])
def test_a_prompt_that_grows_is_answered_like_one_that_was_whole(
    tmp_path: Path, budget: int, kv: str
) -> None:
    methods, prompt = Methods(prune="carriers", kv=kv, kv_budget=0.5), PROMPTS["two videos"]
    whole, growing = Engine(tmp_path), Engine(tmp_path, token_budget=budget)
    ask(whole, prompt, methods=methods)
    whole.finish()
    items = prompt.items(growing)
    parts = [(at, part, part is item.parts[-1]) for at, item in enumerate(items) for part in item.parts]
    there = tuple(
        m.PromptItem(
            parts=(),
            is_whole=False,
            keep_bound=item.keep_bound,
            lasting_bound=item.lasting_bound,
            frame_rows=item.frame_rows,
        )
        for item in items
    )
    growing.prefill("r", prompt.token_ids, there, sampling=SAMPLING, methods=methods)
    for at, part, is_last in parts:
        growing.run()
        growing.handler.handle(m.ExtendPrompt(request_id="r", attempt=0, item=at, part=part, is_last=is_last))
    growing.finish()
    assert growing.answer("r") == whole.answer("r")
    assert prefilled(growing).slots == prefilled(whole).slots
    growing.check()


def test_answers_do_not_depend_on_who_else_runs(tmp_path: Path) -> None:
    engine = Engine(tmp_path, pages=1000, token_budget=23)
    for name, prompt in PROMPTS.items():
        ask(engine, prompt, name)
        ask(engine, prompt, f"{name}, plain", methods=Methods())
    engine.finish()
    for name, prompt in PROMPTS.items():
        assert engine.answer(name) == prompt.answer(6)[0]
    assert engine.used_pages == 0


@pytest.mark.parametrize("steps", range(0, 12, 2))
def test_cancel_in_every_state_frees_all_pages(tmp_path: Path, steps: int) -> None:
    engine = Engine(tmp_path, token_budget=20)
    ask(engine, PROMPTS["sixteen frames"])
    for _ in range(steps):
        engine.handler.step()
    engine.handler.handle(m.CancelRequest(request_id="r"))
    engine.finish()
    assert engine.used_pages == 0
    engine.check()


def test_what_was_computed_of_dropped_tokens_is_reported(tmp_path: Path) -> None:
    engine, prompt = Engine(tmp_path, token_budget=7), PROMPTS["three frames"]
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    engine.prefill("r", prompt.token_ids, prompt.items(engine), sampling=sampling, methods=CARRIERS)
    engine.finish()
    found = prefilled(engine).prompt_logprobs
    assert found is not None
    assert [entry is None for entry in found] == [True] + [False] * (len(prompt.frame) - 1)
    assert np.isfinite([entry[token].logprob for entry in found[1:] if entry for token in entry]).all()


@pytest.mark.parametrize("name", ["sixteen frames", "two videos"])
@pytest.mark.parametrize("budget", [1, 7, 2048])
def test_a_memory_bank_holds_so_many_carriers_and_later_frames_see_no_others(
    tmp_path: Path, name: str, budget: int, rows_run: dict[str, int]
) -> None:
    engine, prompt = Engine(tmp_path, token_budget=budget), PROMPTS[name]
    ask(engine, prompt, methods=LIMITED)
    engine.finish()
    until = limited_until(prompt)
    said, logits = prompt.answer(6, until)
    assert engine.answer("r") == said
    event = prefilled(engine)
    assert event.visual_lasting == MEMORY + len(prompt.clips)
    assert event.slots == int((until == FOREVER).sum())
    _, whole = prompt.answer(1)
    assert (logits.log_softmax(-1) - whole.log_softmax(-1)).abs().max() > 1e-2, "it matters here"
    # which carriers are left depends on all frames, so only the text before them is shared
    ask(engine, prompt, "again", methods=LIMITED)
    engine.finish()
    assert engine.answer("again") == said
    assert rows_run["again"] == rows_run["r"]
    engine.check()
