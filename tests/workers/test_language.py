"""The language handler on a tiny random model: chunks, hand-off, cancels, errors, credits."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve import messages as m
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.engine.rows import DecodeRow
from mmserve.engine.scheduler import Plan
from mmserve.kv.identity import KEY_BYTES
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.request import FinishReason, Methods
from mmserve.sampling import SamplingParams
from mmserve.transfer import LeaseStore
from tests.workers.fakes import BOTH, EOS, IMAGE, VIDEO, Engine, tiny_decoder, whole

LONG = SamplingParams(max_tokens=8, ignore_eos=True)
MIXED = (1, 2, VIDEO, 3, IMAGE, 4, 5)


def mixed(engine: Engine) -> tuple[m.PromptItem, ...]:
    return engine.item(9, [0, 2, 3, 8], seed=1), engine.item(5, seed=2)


def dense_answer(token_ids: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens by running the whole text anew for each, in one pass."""
    ids = list(token_ids)
    for _ in range(count):
        decoder, table, store = tiny_decoder(), PageTable(2, 2, 200, 4), PageStore(200, 4, 8)
        order = torch.arange(len(ids), dtype=torch.int32)
        table.append("s", order.numpy(), order.numpy())
        attention = PagedAttention(table, store, [SequenceRows("s", 0, len(ids))])
        with torch.inference_mode():
            hidden = decoder(decoder.embed(torch.tensor(ids)), order, attention.attend)
            ids.append(int(decoder.logits(hidden[-1:]).argmax()))
    return ids[len(token_ids) :]


def test_an_answer_equals_the_whole_text_run_anew_for_each_token(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    prompt = (5, 6, 7, 8, 9, 10)
    engine.prefill("r", prompt, sampling=LONG)
    engine.finish()
    assert engine.answer("r") == dense_answer(prompt, 8)
    last = engine.reporter.of(m.TokensDecoded)[-1].tokens[-1]
    assert last.finish is FinishReason.LENGTH
    assert engine.used_pages == 0


@pytest.mark.parametrize("kv", ["none", "snapkv", "random"])
@pytest.mark.parametrize("budget", [1, 3, 7])
def test_a_prompt_in_chunks_equals_a_prompt_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, budget: int
) -> None:
    answers, events = [], []
    for rows in (2048, budget):
        engine = Engine(tmp_path, token_budget=rows)
        methods = Methods(kv=kv, kv_budget=0.5)
        engine.prefill("a", MIXED, mixed(engine), sampling=LONG, methods=methods)
        engine.prefill("b", (9, 8, 7), sampling=LONG)
        engine.finish()
        assert engine.used_pages == 0
        answers.append((engine.answer("a"), engine.answer("b")))
        events.append(next(e for e in engine.reporter.of(m.PromptPrefilled) if e.request_id == "a"))
    assert answers[0] == answers[1]
    whole, chunked = events
    assert (whole.slots, whole.kv_bytes, whole.next_order, whole.next_position) == (
        chunked.slots,
        chunked.kv_bytes,
        chunked.next_order,
        chunked.next_position,
    )
    # 5 words of text, 14 uncompressed visual tokens, 9 of them survive the encoder
    assert (whole.next_order, whole.next_position) == (19, 19)
    assert (whole.kv_bytes < whole.kv_bytes_uncompressed) == (kv != "none")


@pytest.mark.parametrize("kv", ["none", "snapkv"])
def test_prefill_here_and_decode_there_equals_one_worker(tmp_path: Path, kv: str) -> None:
    methods = Methods(kv=kv, kv_budget=0.4)
    together = Engine(tmp_path)
    together.prefill("r", MIXED, mixed(together), sampling=LONG, methods=methods)
    together.finish()
    prefill, decode = Engine(tmp_path, roles=BOTH[:1]), Engine(tmp_path, roles=BOTH[1:])
    prefill.prefill("r", MIXED, mixed(prefill), sampling=LONG, methods=methods, hand_off=True)
    prefill.run()
    (event,) = prefill.reporter.of(m.PromptPrefilled)
    assert event.lease is not None
    assert prefill.used_pages == 0, "a handed-off prompt stays"
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert prefill.answer("r") + decode.answer("r") == together.answer("r")
    assert decode.used_pages == 0
    leases = prefill.leases.num_held
    prefill.handler.handle(m.ReleaseLease(lease_id=event.lease.lease_id))
    assert prefill.leases.num_held == leases - 1


def test_the_rest_of_an_answer_after_a_death_equals_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = Engine(tmp_path)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    undisturbed.prefill("r", MIXED, mixed(undisturbed), sampling=params)
    undisturbed.finish()
    whole = undisturbed.answer("r")
    for streamed in range(1, 8):
        again = Engine(tmp_path)
        again.prefill("r", MIXED, mixed(again), sampling=params, forced=tuple(whole[:streamed]))
        again.finish()
        assert again.answer("r") == whole[streamed:], "a forced token was reported, or changed the rest"
        (event,) = again.reporter.of(m.PromptPrefilled)
        assert event.first is None


def test_answers_do_not_depend_on_who_else_runs(tmp_path: Path) -> None:
    prompts = {f"r{i}": tuple(range(1, 3 + 4 * i)) for i in range(5)}
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=1, ignore_eos=True)
    crowd = Engine(tmp_path)
    for name, prompt in prompts.items():
        crowd.prefill(name, prompt, sampling=params)
    crowd.finish()
    for name, prompt in prompts.items():
        alone = Engine(tmp_path)
        alone.prefill(name, prompt, sampling=params)
        alone.finish()
        assert alone.answer(name) == crowd.answer(name)


def test_an_end_of_sequence_ends_the_answer_unless_it_is_ignored(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        assert decoder.lm_head is not None
        decoder.lm_head.weight.zero_()
        decoder.lm_head.weight[EOS] = torch.randn(16)
    for ignore in (False, True):
        engine = Engine(tmp_path, decoder=decoder)
        # whichever sign the score of EOS has, some prompt begins with it
        for word in range(20):
            engine.prefill(f"r{word}", (word,), sampling=SamplingParams(max_tokens=3, ignore_eos=ignore))
        engine.finish()
        firsts = [event.first for event in engine.reporter.of(m.PromptPrefilled)]
        stopped = [first for first in firsts if first is not None and first.finish is FinishReason.STOP]
        assert bool(stopped) == (not ignore)
        assert engine.used_pages == 0


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("hand_off", [False, True])
def test_cancel_in_every_state_frees_all_pages(tmp_path: Path, steps: int, hand_off: bool) -> None:
    engine = Engine(tmp_path, token_budget=4)
    idle = engine.handler.credits()
    engine.prefill("gone", MIXED, mixed(engine), methods=Methods(kv="snapkv"), hand_off=hand_off)
    for _ in range(steps):
        engine.handler.step()
        for event in engine.reporter.of(m.PromptPrefilled):
            engine.handler.handle(engine.continuation(event))
        engine.reporter.events.clear()
    for name in ("gone", "gone", "unknown"):
        engine.handler.handle(m.CancelRequest(request_id=name))
    assert engine.used_pages == 0
    assert engine.handler.credits() == idle == engine.handler.capacity
    engine.run()
    assert not engine.reporter.events
    engine.prefill("next", (1, 2, 3))
    engine.finish()
    assert len(engine.answer("next")) == 5
    engine.check()


# errors


def wide(engine: Engine) -> m.PromptItem:
    part = engine.part(3)
    return whole(m.EncodedPart(lease=part.lease, tokens=2, kept=3))


@pytest.mark.parametrize(
    ("prompt", "make", "methods", "code"),
    [
        ((1, VIDEO), wide, Methods(), "wire_error"),
        ((1, 2), wide, Methods(), "bad_request"),
        ((), None, Methods(), "bad_request"),
        ((1, 10**6), None, Methods(), "internal_error"),
        ((1, 2), None, Methods(kv="nothing_like_it"), "bad_request"),
    ],
)
def test_what_cannot_run_is_answered_and_the_handler_goes_on(
    tmp_path: Path,
    prompt: tuple[int, ...],
    make: object,
    methods: Methods,
    code: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(tmp_path)
    items = (make(engine),) if callable(make) else ()
    engine.prefill("bad", prompt, items, methods=methods)
    engine.prefill("good", (1, 2, 3))
    engine.finish()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert (failure.request_id, failure.code) == ("bad", code)
    assert "Traceback" not in failure.public_message
    assert len(engine.answer("good")) == 5
    assert engine.used_pages == 0
    assert engine.handler.credits() == engine.handler.capacity
    assert bool(caplog.records) == (code == "internal_error")


def test_a_decode_without_its_prompt_is_answered(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    command = m.DecodeFrom(
        request_id="r", attempt=2, tokens=(1,), sampling=LONG, next_order=3, next_position=3
    )
    engine.handler.handle(command)
    engine.run()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert (failure.attempt, failure.code) == (2, "bad_request")


def test_a_step_that_fails_is_answered_for_everyone_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tmp_path)
    engine.prefill("a", (1, 2, 3))
    engine.prefill("b", (4, 5, 6))

    def fail(plan: Plan, decodes: dict[str, DecodeRow]) -> dict[str, torch.Tensor]:
        for chunk in plan.chunks:
            prompt = engine.runner.prompts[chunk.sequence]
            engine.table.append(chunk.sequence, prompt.order, prompt.position)
        raise RuntimeError("a kernel fell over at 0x7f00")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", fail)
        engine.run()
    assert {event.request_id for event in engine.reporter.of(m.RequestFailed)} == {"a", "b"}
    assert "0x7f" not in engine.reporter.of(m.RequestFailed)[0].public_message
    assert engine.used_pages == 0
    assert len(caplog.records) == 2
    engine.prefill("c", (1, 2, 3))
    engine.finish()
    assert len(engine.answer("c")) == 5


def test_scores_that_are_not_numbers_fail_one_request_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tmp_path)
    arrays = {name: np.zeros(1, np.int32) for name in ("source", "index")}
    arrays |= {"embeddings": np.full((1, 16), math.nan), "key": np.zeros((1, KEY_BYTES), np.uint8)}
    part = m.EncodedPart(lease=engine.leases.publish(arrays, ttl_s=9), tokens=1, kept=1)
    sampled = SamplingParams(max_tokens=3, temperature=1.0, seed=1)
    engine.prefill("nan", (1, IMAGE), (whole(part),), sampling=sampled)
    engine.prefill("good", (1, 2, 3))
    engine.finish()
    assert [event.request_id for event in engine.reporter.of(m.RequestFailed)] == ["nan"]
    assert len(engine.answer("good")) == 5
    assert engine.used_pages == 0
    assert len(caplog.records) == 1


def test_a_full_transfer_directory_fails_one_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tmp_path)

    def publish(*_: object, **__: object) -> m.Lease:
        raise OSError(28, "No space left on device")

    engine.prefill("r", (1, 2, 3), hand_off=True)
    with monkeypatch.context() as patch:
        patch.setattr(LeaseStore, "publish", publish)
        engine.run()
    assert [event.request_id for event in engine.reporter.of(m.RequestFailed)] == ["r"]
    assert engine.used_pages == 0
    assert caplog.records


# credits


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(4, 120),
    jobs=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["none", "random"]), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    rng=st.randoms(use_true_random=False),
)
def test_who_spends_no_more_than_the_credits_never_runs_out_of_pages(
    tmp_path_factory: pytest.TempPathFactory,
    pages: int,
    jobs: list[tuple[int, int, str, bool]],
    rng: random.Random,
) -> None:
    engine = Engine(tmp_path_factory.mktemp("engine"), pages=pages)
    waiting = [
        (f"r{i}", (IMAGE, *[1] * rows), SamplingParams(max_tokens=tokens, ignore_eos=True), kv, ended)
        for i, (rows, tokens, kv, ended) in enumerate(jobs)
    ]
    capacity = engine.handler.capacity
    waiting = [job for job in waiting if len(job[1]) + 1 + job[2].max_tokens <= capacity.slots]
    expected = {job[0] for job in waiting}
    item = engine.item(2)
    seen, cancelled = 0, set()
    for _ in range(2000):
        # as the dispatcher counts: absolute credits less what was sent since
        credits = engine.handler.credits()
        places, slots = credits.requests, credits.slots
        while waiting and places > 0 and (cost := len(waiting[0][1]) + 1 + waiting[0][2].max_tokens) <= slots:
            name, prompt, sampling, kv, _ = waiting.pop(0)
            engine.prefill(name, prompt, (item,), sampling=sampling, methods=Methods(kv=kv, kv_budget=0.5))
            places, slots = places - 1, slots - cost
        for _ in range(rng.randint(1, 3)):
            engine.handler.step()
        for event in engine.reporter.events[seen:]:
            if isinstance(event, m.PromptPrefilled) and (event.first is None or not event.first.finish):
                if rng.random() < 0.1:
                    cancelled.add(event.request_id)
                    engine.handler.handle(m.CancelRequest(request_id=event.request_id))
                else:
                    engine.handler.handle(engine.continuation(event))
            seen += 1
        if not waiting and not engine.handler.step() and seen == len(engine.reporter.events):
            break
    assert not engine.reporter.of(m.RequestFailed)
    for name in expected - cancelled:
        assert len(engine.answer(name)) == engine.sampling[name].max_tokens
    assert engine.used_pages == 0
    assert engine.handler.credits() == capacity
    assert all(credits.slots <= capacity.slots for credits in engine.reporter.credits)


def test_credits_hold_back_what_a_prompt_in_the_queue_will_take(tmp_path: Path) -> None:
    engine = Engine(tmp_path)

    def free(credits: m.Credits) -> int:
        """Slots per head, with those that the offered requests may lose to rounding."""
        return credits.slots + credits.requests * (engine.table.page_size - 1)

    left = free(engine.handler.credits()) - 48
    engine.prefill("bad", (1, VIDEO))
    engine.prefill("waits", (1,) * 40, sampling=LONG)
    assert free(engine.handler.credits()) < left
    engine.handler.step()
    # the failure of the first was sent while the second had not begun
    assert isinstance(engine.reporter.events[0], m.RequestFailed)
    assert free(engine.reporter.credits[0]) == left
    # prefilled, its decode not yet asked for: the answer's pages are still its own
    assert isinstance(engine.reporter.events[1], m.PromptPrefilled)
    assert free(engine.handler.credits()) == left


# prompts that grow


def grow(
    engine: Engine, name: str, item: int, part: m.EncodedPart, *, is_last: bool, attempt: int = 0
) -> None:
    engine.handler.handle(
        m.ExtendPrompt(request_id=name, attempt=attempt, item=item, part=part, is_last=is_last)
    )


@pytest.mark.parametrize("kv", ["none", "snapkv"])
@pytest.mark.parametrize("budget", [1, 7, 2048])
def test_a_prompt_that_grows_is_answered_like_one_that_was_whole(
    tmp_path: Path, kv: str, budget: int
) -> None:
    methods = Methods(kv=kv, kv_budget=0.5)
    engine = Engine(tmp_path, token_budget=budget)
    parts = engine.part(9, seed=1), engine.part(80, seed=1, first=9)
    engine.prefill("whole", (1, 2, VIDEO, 3), (whole(*parts),), methods=methods)
    engine.finish()
    grown = Engine(tmp_path, token_budget=budget)
    start = m.PromptItem(parts=parts[:1], is_whole=False, keep_bound=100)
    grown.prefill("grown", (1, 2, VIDEO, 3), (start,), methods=methods)
    grown.run()
    if kv == "none":
        rows = grown.runner.prompts["grown"]
        assert rows.done == rows.ready == 10
    else:
        assert not grown.used_pages, "it takes no pages before there is anything to run"
    assert not grown.reporter.of(m.PromptPrefilled)
    grow(grown, "grown", 0, parts[1], is_last=True)
    grown.finish()
    assert grown.answer("grown") == engine.answer("whole")
    assert grown.reporter.of(m.PromptPrefilled)[0].slots == engine.reporter.of(m.PromptPrefilled)[0].slots
    assert grown.used_pages == 0


def test_others_go_on_while_a_prompt_waits_for_its_media(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.prefill("grows", (1, VIDEO, 3), (m.PromptItem(parts=(), is_whole=False, keep_bound=9),))
    engine.prefill("text", (1, 2, 3))
    engine.finish()
    assert len(engine.answer("text")) == 5
    engine.handler.handle(m.CancelRequest(request_id="grows"))
    grow(engine, "grows", 0, engine.part(9), is_last=True)
    engine.run()
    assert engine.used_pages == 0
    assert not engine.reporter.of(m.RequestFailed)


def test_a_part_of_an_earlier_attempt_is_not_wanted(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.prefill("r", (1, VIDEO, 3), (m.PromptItem(parts=(), is_whole=False, keep_bound=9),))
    grow(engine, "r", 0, engine.part(9, seed=5), is_last=True, attempt=7)
    engine.run()
    assert not engine.reporter.of(m.PromptPrefilled)
    grow(engine, "r", 0, engine.part(9), is_last=True)
    engine.finish()
    assert len(engine.answer("r")) == 5


@pytest.mark.parametrize("admitted", [True, False])
def test_a_part_that_cannot_be_read_is_asked_for_again(tmp_path: Path, admitted: bool) -> None:
    engine = Engine(tmp_path)
    engine.prefill("r", (1, VIDEO, 3), (m.PromptItem(parts=(), is_whole=False, keep_bound=9),))
    if admitted:
        engine.run()
    part = engine.part(9)
    engine.leases.release(part.lease.lease_id)
    grow(engine, "r", 0, part, is_last=True)
    engine.prefill("good", (1, 2, 3))
    engine.finish()
    (lost,) = engine.reporter.of(m.LeaseLost)
    assert (lost.request_id, lost.attempt, lost.lease_id) == ("r", 0, part.lease.lease_id)
    assert not engine.reporter.of(m.RequestFailed)
    assert len(engine.answer("good")) == 5
    assert engine.used_pages == 0


@pytest.mark.parametrize("how", ["gone", "broken"])
def test_embeddings_lost_before_or_behind_their_columns_are_asked_for_again(tmp_path: Path, how: str) -> None:
    engine = Engine(tmp_path)
    part = engine.part(9)
    if how == "gone":
        engine.leases.release(part.lease.lease_id)
    else:  # found when they are read, after the prompt was laid out
        with Path(part.lease.path).open("r+b") as file:
            file.seek(part.lease.arrays[0].offset)
            file.write(b"\xff")
    engine.prefill("r", (1, VIDEO, 3), (whole(part),))
    engine.finish()
    (lost,) = engine.reporter.of(m.LeaseLost)
    assert lost.lease_id == part.lease.lease_id
    assert not engine.reporter.of(m.RequestFailed)
    assert engine.used_pages == 0
    assert engine.handler.credits() == engine.handler.capacity
    engine.prefill("r", (1, VIDEO, 3), (engine.item(9),))
    engine.finish()
    assert len(engine.answer("r")) == 5


def test_kv_that_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    prefill = Engine(tmp_path, roles=(m.Role.PREFILL,))
    prefill.prefill("r", (1, 2, 3), hand_off=True)
    prefill.run()
    (event,) = prefill.reporter.of(m.PromptPrefilled)
    assert event.lease is not None
    prefill.leases.release(event.lease.lease_id)
    decode = Engine(tmp_path, roles=(m.Role.DECODE,))
    decode.sampling = prefill.sampling
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert [lost.lease_id for lost in decode.reporter.of(m.LeaseLost)] == [event.lease.lease_id]
    assert not decode.reporter.of(m.RequestFailed)
    assert decode.handler.credits() == decode.handler.capacity
