"""choose: credit decides, media stay with their encoder, suspects run alone."""

from __future__ import annotations

from collections import Counter

from mmserve.messages import DECODE_HEADROOM, Credits, Role, Sampled
from mmserve.request import MediaRef, Prompt
from mmserve.sampling import SamplingParams
from mmserve.workers.records import Record, Worker
from mmserve.workers.routing import Job, choose, holds_back, new_job, room


def worker(name: str, *roles: Role, requests: int = 4, slots: int = 100, holds: int = 0) -> Worker:
    credits = Credits(requests=requests, slots=slots)
    return Worker(
        name=name,
        roles=roles,
        pid=1,
        capacity=credits,
        credits=credits,
        last_heard_at=0.0,
        holds={f"h{i}" for i in range(holds)},
    )


def record(name: str = "r", digest: str = "d", suspect: bool = False) -> Record:
    ref = MediaRef(modality="image", path="/x", digest=digest, source="s")
    return Record(
        request_id=name,
        admitted_at=0.0,
        deadline_at=9.0,
        prompt=Prompt(token_ids=(1,), media=(ref,)),
        is_suspect=suspect,
    )


def job(role: Role, slots: int = 10) -> Job:
    return _job("r", role, slots)


def _job(name: str, role: Role, slots: int) -> Job:
    return Job(
        request_id=name,
        attempt=0,
        role=role,
        item=0 if role is Role.ENCODE else None,
        slots=slots,
        most_slots=slots,
        turn=(0, True, 0),
        queued_at=0.0,
    )


LIVE = {"r", "other"}


def test_the_least_busy_worker_of_the_role_with_credit_is_chosen() -> None:
    workers = [
        worker("decode-0-1", Role.DECODE),
        worker("prefill-0-1", Role.PREFILL, holds=2),
        worker("prefill-1-1", Role.PREFILL, holds=1),
        worker("prefill-2-1", Role.PREFILL, slots=9),
        worker("prefill-3-1", Role.PREFILL, requests=0),
    ]
    assert choose(job(Role.PREFILL), record(), workers, LIVE) is workers[2]
    assert choose(job(Role.PREFILL, 101), record(), workers, LIVE) is None
    assert choose(job(Role.ENCODE), record(), workers, LIVE) is None


def test_equal_media_go_to_one_encoder_also_after_its_restart() -> None:
    before = [worker(f"encode-{slot}-1", Role.ENCODE) for slot in range(4)]
    after = [worker(f"encode-{slot}-{7 + slot}", Role.ENCODE) for slot in range(4)]
    spread: Counter[str] = Counter()
    for number in range(200):
        item = record(digest=f"{number:064x}")
        first = choose(job(Role.ENCODE), item, before, LIVE)
        second = choose(job(Role.ENCODE), item, reversed(after), LIVE)
        assert first is not None
        assert second is not None
        assert first.name.rpartition("-")[0] == second.name.rpartition("-")[0]
        spread[first.name] += 1
    assert len(spread) == 4
    assert min(spread.values()) > 20


def test_losing_an_encoder_moves_only_its_own_media() -> None:
    workers = [worker(f"encode-{slot}-1", Role.ENCODE) for slot in range(3)]
    for number in range(60):
        item = record(digest=f"{number}")
        owner = choose(job(Role.ENCODE), item, workers, LIVE)
        left = choose(job(Role.ENCODE), item, workers[1:], LIVE)
        assert owner is workers[0] or left is owner


def test_an_item_waits_for_its_busy_owner() -> None:
    workers = [worker(f"encode-{slot}-1", Role.ENCODE) for slot in range(3)]
    owner = choose(job(Role.ENCODE), record(), workers, LIVE)
    assert owner is not None
    owner.credits = Credits(requests=0)
    assert choose(job(Role.ENCODE), record(), workers, LIVE) is None


def test_a_suspect_reserves_a_worker_and_waits_until_it_is_empty() -> None:
    workers = [worker("decode-0-1", Role.DECODE, holds=2), worker("decode-1-1", Role.DECODE, holds=1)]
    suspect = record(suspect=True)
    assert choose(job(Role.DECODE), suspect, workers, LIVE) is None
    assert workers[1].reserved_for == "r"
    # nobody joins meanwhile, and the suspect does not change its mind
    other = _job("other", Role.DECODE, 1)
    assert choose(other, record("other"), workers, LIVE) is workers[0]
    workers[0].holds.clear()
    assert choose(job(Role.DECODE), suspect, workers, LIVE) is None
    workers[1].holds.clear()
    assert choose(job(Role.DECODE), suspect, workers, LIVE) is workers[1]
    assert choose(other, record("other"), workers[1:], LIVE) is None


def test_two_suspects_never_share_a_worker() -> None:
    workers = [worker("decode-0-1", Role.DECODE)]
    assert choose(job(Role.DECODE), record(suspect=True), workers, LIVE) is workers[0]
    other = _job("other", Role.DECODE, 1)
    assert choose(other, record("other", suspect=True), workers, LIVE) is None


def test_a_reservation_ends_with_its_request() -> None:
    workers = [worker("decode-0-1", Role.DECODE)]
    workers[0].reserved_for = "gone"
    assert choose(job(Role.DECODE), record(), workers, LIVE) is workers[0]
    assert workers[0].reserved_for is None


def test_a_job_says_what_it_needs_and_whose_turn_it_is() -> None:
    made = record()
    made.prompt = Prompt(token_ids=(1,), sampling=SamplingParams(max_tokens=100), priority=2)
    made.arrival = 7
    first = new_job(made, Role.PREFILL, 1.0, prompt_slots=30)
    assert (first.slots, first.most_slots, first.turn) == (30 + DECODE_HEADROOM, 130, (2, True, 7))
    encode = new_job(made, Role.ENCODE, 1.0, item=0)
    assert (encode.slots, encode.most_slots, encode.item) == (0, 0, 0)
    made.attempt = 1
    made.tokens = [Sampled(request_id="r", attempt=0, seq=i, token_id=i) for i in range(90)]
    again = new_job(made, Role.DECODE, 1.0, prompt_slots=30)
    assert (again.slots, again.most_slots, again.turn) == (130, 130, (2, False, 7))
    assert again.turn < first.turn


def test_the_room_of_a_role_is_that_of_its_largest_worker() -> None:
    workers = [
        worker("prefill-0-1", Role.PREFILL, slots=5),
        worker("decode-0-1", Role.PREFILL, Role.DECODE, slots=7),
    ]
    assert (room(workers, Role.PREFILL), room(workers, Role.DECODE), room(workers, Role.ENCODE)) == (
        7,
        7,
        None,
    )


def test_only_jobs_that_wait_for_room_hold_back_others() -> None:
    assert holds_back(job(Role.PREFILL), record())
    assert holds_back(job(Role.DECODE), record())
    assert not holds_back(job(Role.ENCODE), record())
    assert not holds_back(job(Role.PREFILL), record(suspect=True))


def test_a_worker_that_will_be_killed_gets_nothing() -> None:
    workers = [worker("decode-0-1", Role.DECODE)]
    workers[0].is_killed = True
    assert choose(job(Role.DECODE), record(), workers, LIVE) is None
    assert choose(job(Role.DECODE), record(suspect=True), workers, LIVE) is None
