"""Record and Worker: counts, times that sum up, credits less what was sent since."""

from __future__ import annotations

from signal import SIGKILL, SIGSEGV

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve import messages as m
from mmserve.request import MediaRef, MediaReport, Prompt, Timings, Usage
from mmserve.sampling import Logprob
from mmserve.workers.records import Item, Record, State, Worker

LEASE = m.Lease(lease_id="0" * 32, path="/x", total_bytes=1, arrays=(), checksum=0)
MS = st.floats(0, 1e5)
PARTS = ("fetch", "decode", "preprocess", "encode", "prune", "transfer", "queue", "prefill", "other")


def item(tokens: int, kept: int, cached: int = 0, times: m.EncodeTimes | None = None) -> Item:
    report = MediaReport(source="s", frames=1, timestamps_s=(0.0,), lost_frames=0, width=4, height=4)
    none = m.EncodeTimes(queue=0, decode=0, preprocess=0, encode=0, prune=0, publish=0)
    return Item(
        parts=[m.EncodedPart(lease=LEASE, tokens=tokens, kept=kept)],
        whole=m.EncodedMedia(cached_tokens=cached, report=report, times=times or none),
    )


def record(items: list[Item] | None = None, **changes: object) -> Record:
    refs = tuple(MediaRef(modality="video", path="/x", digest="d", source="s") for _ in items or [])
    made = Record(request_id="r", admitted_at=10.0, deadline_at=20.0, items=items or [])
    made.prompt = Prompt(token_ids=(1,) * (4 + len(refs)), media=refs)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def prefilled(queue_ms: float = 0.0, transfer_ms: float = 0.0, prefill_ms: float = 0.0) -> m.PromptPrefilled:
    return m.PromptPrefilled(
        request_id="r",
        attempt=0,
        first=None,
        lease=None,
        next_order=1,
        next_position=1,
        slots=1,
        kv_bytes=30,
        kv_bytes_uncompressed=90,
        queue_ms=queue_ms,
        transfer_ms=transfer_ms,
        prefill_ms=prefill_ms,
    )


def test_what_is_dropped_in_prefill_is_not_kept_and_takes_no_slots_after_it() -> None:
    made = record([item(101, 101), item(20, 9)])
    made.items[0].lasting_bound, made.items[0].frame_rows = 11, 10
    assert made.prompt_slots == 4 + 11 + 9
    assert made.usage().visual_tokens_kept == 110
    sent = made.items[0].for_prefill()
    assert (sent.keep_bound, sent.lasting_bound, sent.frame_rows) == (101, 11, 10)
    made.prefilled = msgspec.structs.replace(prefilled(), visual_lasting=20)
    assert made.usage().visual_tokens_kept == 20


def test_usage_counts_tokens_before_and_after_reduction() -> None:
    ended = msgspec.structs.replace(prefilled(), visual_by_layer=(60, 25), kv_bytes_dense=120)
    made = record([item(37, 10, cached=36), item(100, 50)], prefilled=ended)
    made.tokens = [m.Sampled(request_id="r", attempt=0, seq=i, token_id=i) for i in range(3)]
    assert made.usage() == Usage(
        prompt_tokens=4 + 137,
        completion_tokens=3,
        visual_tokens=137,
        visual_tokens_kept=60,
        visual_tokens_layer_mean=42.5,
        visual_tokens_by_layer=(60, 25),
        visual_tokens_cached=36,
        kv_bytes=30,
        kv_bytes_uncompressed=90,
        kv_bytes_dense=120,
    )


def test_what_is_reported_at_the_end_is_the_first_prefill() -> None:
    first, again = prefilled(), prefilled()
    logprobs = (None, {7: Logprob(logprob=-1.0, rank=1)})
    first = msgspec.structs.replace(first, cached_slots=2, prompt_logprobs=logprobs)
    made = record([item(5, 5, cached=1)])
    made.take_prefilled(first)
    assert made.prompt_logprobs == logprobs
    made.items, made.prefilled = [item(5, 5, cached=5)], None
    assert made.prompt_logprobs is None
    made.take_prefilled(again)
    made.end(State.FINISHED, 11.0)
    assert (made.state, made.ended_at, made.kv_lease) == (State.FINISHED, 11.0, None)
    assert (made.usage().cached_tokens, made.usage().visual_tokens_cached) == (2, 1)
    assert made.prompt_logprobs == logprobs


@pytest.mark.parametrize(
    ("signals", "poisoned"),
    [
        ([SIGSEGV], [False]),
        ([SIGSEGV, SIGSEGV], [False, True]),
        ([SIGKILL, SIGSEGV], [False, True]),
        ([SIGKILL, SIGKILL, SIGKILL], [False, False, True]),
    ],
)
def test_a_second_death_alone_is_poison_and_sigkill_counts_less(
    signals: list[int], poisoned: list[bool]
) -> None:
    made = record()
    assert [made.blame(signal) for signal in signals] == poisoned
    assert made.is_suspect


def test_usage_of_a_request_that_ended_early_is_what_is_known() -> None:
    assert record([Item(), Item()]).usage() == Usage(prompt_tokens=4)


@given(
    st.lists(st.tuples(MS, MS, MS, MS, MS, MS), max_size=3),
    st.tuples(MS, MS, MS, MS, MS),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_the_parts_sum_to_the_time_to_the_first_token(
    items: list[tuple[float, ...]], others: tuple[float, ...], first_s: float, rest_s: float
) -> None:
    names = ("queue", "decode", "preprocess", "encode", "prune", "publish")
    made = record([item(5, 5, times=m.EncodeTimes(**dict(zip(names, ms, strict=True)))) for ms in items])
    made.fetch_ms, made.waited_ms = others[:2]
    made.prefilled = prefilled(queue_ms=others[2], transfer_ms=others[3], prefill_ms=others[4])
    made.first_token_at = made.admitted_at + first_s
    made.ended_at = made.first_token_at + rest_s
    times = made.timings()
    parts = [getattr(times, name) for name in PARTS]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(times.ttft, abs=1e-6)
    assert times.ttft + times.generate == pytest.approx(times.total, abs=1e-6)
    assert times.ttft == pytest.approx(first_s * 1e3, abs=1e-6)


def test_times_of_a_request_that_never_got_a_token() -> None:
    assert record().timings() == Timings()
    made = record(ended_at=12.0, fetch_ms=500.0)
    times = made.timings()
    assert (times.ttft, times.total, times.generate) == (2000.0, 2000.0, 0.0)
    assert (times.fetch, times.other) == (500.0, 1500.0)


def test_only_three_states_are_terminal() -> None:
    assert {state for state in State if state.is_terminal} == {
        State.FINISHED,
        State.FAILED,
        State.CANCELLED,
    }


def worker(requests: int = 2, slots: int = 100) -> Worker:
    credits = m.Credits(requests=requests, slots=slots)
    return Worker(
        name="w", roles=(m.Role.PREFILL,), pid=1, capacity=credits, credits=credits, last_heard_at=0.0
    )


def test_what_was_sent_since_is_subtracted_until_the_worker_has_seen_it() -> None:
    made = worker()
    assert made.can_take(100)
    assert not made.can_take(101)
    made.unseen.extend([(1, 60), (2, 30)])
    assert not made.can_take(1)
    made.heard(m.Credits(requests=2, slots=100), seen=0, now=1.0)
    assert not made.can_take(1), "both places are taken"
    made.heard(m.Credits(requests=2, slots=40), seen=1, now=2.0)
    assert made.can_take(10)
    assert not made.can_take(11)
    made.heard(m.Credits(requests=1, slots=10), seen=2, now=3.0)
    assert not made.unseen
    assert made.can_take(10)
    assert made.last_heard_at == 3.0
    made.is_killed = True
    assert not made.can_take(0)
