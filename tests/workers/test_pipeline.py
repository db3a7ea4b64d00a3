"""Pipeline: the thread that owns every request goes on whatever it is told, and ends them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mmserve import messages as m
from mmserve.errors import MMServeError, Overloaded, Unavailable
from mmserve.messages import Role
from mmserve.queues import Dealer, ipc_endpoint
from mmserve.request import FinishReason, MediaRef, Prompt
from mmserve.sampling import SamplingParams
from mmserve.workers.dispatcher import Update
from mmserve.workers.pipeline import COMMANDS, EVENTS, Pipeline
from mmserve.workers.records import State

TEXT = Prompt(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))


@dataclass
class Listener:
    """Collects updates; `final` is set with the last one."""

    updates: list[Update] = field(default_factory=list)
    final: threading.Event = field(default_factory=threading.Event)

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        if update.is_final:
            self.final.set()

    def wait(self) -> Update:
        assert self.final.wait(10), "no final update"
        return self.updates[-1]


class FakeWorker:
    """A worker of every role on a real socket, stepped by the test's own thread."""

    def __init__(self, endpoint: str, name: str = "all-0-1", slots: int = 10_000) -> None:
        self.dealer = Dealer(endpoint, name.encode())
        self.credits = m.Credits(requests=8, slots=slots)
        self.seen = 0
        self.frames: list[bytes] = []
        ready = m.WorkerReady(roles=tuple(Role), pid=7, weights_revision="w", capacity=self.credits)
        self.send(ready)

    def send(self, event: m.AnyEvent) -> None:
        upward = m.Upward(epoch="", seen=self.seen, credits=self.credits, event=event)
        self.dealer.send(EVENTS.encode(upward))
        self.dealer.flush(1.0)

    def expect(self, kind: type[m.Command]) -> m.AnyCommand:
        """The next command, which is of this kind."""
        until = time.monotonic() + 10
        while not self.frames and time.monotonic() < until:
            # several may come at once
            self.frames += self.dealer.poll(0.05)
        assert self.frames, f"no {kind.__name__} came"
        downward = COMMANDS.decode(self.frames.pop(0))
        self.seen = downward.number
        assert isinstance(downward.command, kind)
        return downward.command


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    tmp_path.chmod(0o700)
    made = Pipeline(ipc_endpoint(tmp_path), [tmp_path], max_active=4, deadline_s=30)
    yield made
    made.close()


@pytest.fixture
def worker(pipeline: Pipeline) -> Iterator[FakeWorker]:
    made = FakeWorker(pipeline.endpoint)
    pipeline.wait_ready(10)
    yield made
    made.dealer.close()


def sampled(request_id: str, seq: int, finish: FinishReason | None = None) -> m.Sampled:
    return m.Sampled(request_id=request_id, attempt=0, seq=seq, token_id=40 + seq, finish=finish)


def prefilled(request_id: str, first: m.Sampled) -> m.PromptPrefilled:
    return m.PromptPrefilled(
        request_id=request_id,
        attempt=0,
        first=first,
        lease=None,
        next_order=3,
        next_position=3,
        slots=3,
        kv_bytes=1,
        kv_bytes_uncompressed=1,
        queue_ms=0,
        transfer_ms=0,
        prefill_ms=0,
    )


def answer(worker: FakeWorker) -> str:
    """Serve one request from prompt to its last token."""
    command = worker.expect(m.PrefillPrompt)
    assert isinstance(command, m.PrefillPrompt)
    worker.send(prefilled(command.request_id, sampled(command.request_id, 0)))
    worker.expect(m.DecodeFrom)
    last = sampled(command.request_id, 1, FinishReason.LENGTH)
    worker.send(m.TokensDecoded(tokens=(last,)))
    return command.request_id


def test_a_request_gets_its_tokens_and_one_final_update(pipeline: Pipeline, worker: FakeWorker) -> None:
    listener = Listener()
    request_id = pipeline.admit(listener)
    pipeline.submit(request_id, TEXT, fetch_ms=3.0)
    assert answer(worker) == request_id
    final = listener.wait()
    assert final.record.state is State.FINISHED
    assert [token.token_id for update in listener.updates for token in update.tokens] == [40, 41]
    # whatever comes later changes nothing
    worker.send(m.TokensDecoded(tokens=(sampled(request_id, 2),)))
    for call in (pipeline.cancel, pipeline.stop):
        call(request_id)
    pipeline.fail(request_id, MMServeError("late"))
    assert pipeline.counts()["active"] == 0
    assert [update.is_final for update in listener.updates].count(True) == 1


def test_who_waits_for_a_first_token_is_counted(pipeline: Pipeline, worker: FakeWorker) -> None:
    listeners = [Listener(), Listener()]
    first, second = map(pipeline.admit, listeners)
    assert pipeline.without_token == 0, "their media are not here yet"
    for request_id in (first, second):
        pipeline.submit(request_id, TEXT)
    assert pipeline.counts()["active"] == pipeline.without_token == 2
    worker.expect(m.PrefillPrompt)
    worker.send(prefilled(first, sampled(first, 0)))
    worker.expect(m.PrefillPrompt)
    worker.expect(m.DecodeFrom)
    assert pipeline.without_token == 1
    pipeline.cancel(second)
    listeners[1].wait()
    assert pipeline.without_token == 0


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (Pipeline.cancel, State.CANCELLED),
        (Pipeline.stop, State.FINISHED),
        (lambda p, r: p.fail(r, Unavailable("x")), State.FAILED),
    ],
)
def test_every_end_is_told_once(
    pipeline: Pipeline, end: Callable[[Pipeline, str], None], state: State
) -> None:
    listener = Listener()
    request_id = pipeline.admit(listener)
    end(pipeline, request_id)
    end(pipeline, request_id)
    pipeline.submit(request_id, TEXT)
    assert listener.wait().record.state is state
    assert pipeline.counts()["active"] == 0
    assert len(listener.updates) == 1


def test_a_full_server_refuses_and_recovers(pipeline: Pipeline) -> None:
    requests = [pipeline.admit(Listener()) for _ in range(4)]
    with pytest.raises(Overloaded):
        pipeline.admit(Listener())
    pipeline.cancel(requests[0])
    pipeline.admit(Listener())


def test_waiting_for_workers_says_which_stage_is_missing(pipeline: Pipeline) -> None:
    with pytest.raises(Unavailable, match=r"within 0 s, but none for decode, encode, prefill"):
        pipeline.wait_ready(0.01)
    assert not pipeline.is_ready


def test_who_waits_hears_what_the_supervisor_reported(pipeline: Pipeline) -> None:
    listener = Listener()
    pipeline.admit(listener)
    heard: list[MMServeError] = []

    def wait() -> None:
        try:
            pipeline.wait_ready(10)
        except MMServeError as error:
            heard.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    failure = MMServeError("Worker decode-0 died too often to be started again")
    pipeline.report_failure(failure)
    waiter.join(10)
    assert heard == [failure]
    assert listener.wait().record.error is failure
    with pytest.raises(MMServeError, match="too often"):
        pipeline.admit(Listener())


def test_close_ends_everything_and_may_be_repeated(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    pipeline = Pipeline(ipc_endpoint(tmp_path), [tmp_path], max_active=9, deadline_s=30)
    listeners = [Listener() for _ in range(5)]
    requests = [pipeline.admit(listener) for listener in listeners]
    pipeline.submit(requests[0], TEXT)
    pipeline.close()
    pipeline.close()
    for listener in listeners:
        assert isinstance(listener.updates[0].record.error, Unavailable)
        assert len(listener.updates) == 1
    for call in (pipeline.counts, pipeline.worker_pids, lambda: pipeline.admit(Listener())):
        with pytest.raises(Unavailable, match="shutting down"):
            call()
    # harmless: a client that leaves after the server
    pipeline.cancel(requests[0])
    pipeline.submit(requests[1], TEXT)


def test_whoever_is_admitted_while_it_closes_is_refused_or_ended(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for round_ in range(5):
        pipeline = Pipeline(ipc_endpoint(tmp_path), [tmp_path], max_active=10**6, deadline_s=30)
        admitted: list[Listener] = []
        refused = threading.Event()

        def admit(
            pipeline: Pipeline = pipeline,
            admitted: list[Listener] = admitted,
            refused: threading.Event = refused,
        ) -> None:
            while not refused.is_set():
                listener = Listener()
                try:
                    pipeline.admit(listener)
                except Unavailable:
                    refused.set()
                else:
                    admitted.append(listener)

        thread = threading.Thread(target=admit)
        thread.start()
        until = time.monotonic() + 10
        while len(admitted) < 3 * round_ and time.monotonic() < until:
            thread.join(0.001)
        pipeline.close()
        thread.join(10)
        assert refused.is_set()
        for listener in admitted:
            listener.wait()
            assert len(listener.updates) == 1


# nothing that comes in ends the thread


def test_a_listener_that_raises_harms_nobody(
    pipeline: Pipeline, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(update: Update) -> None:
        raise RuntimeError("a front door fell over")

    pipeline.cancel(pipeline.admit(broken))
    listener = Listener()
    pipeline.submit(pipeline.admit(listener), TEXT)
    answer(worker)
    assert listener.wait().record.state is State.FINISHED
    assert caplog.records[0].exc_info is not None


def test_an_unexpected_error_reaches_its_caller(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError):
        pipeline.admit(Listener(), deadline_s="soon")  # type: ignore[arg-type]  # the point of the test
    assert pipeline.counts()["active"] == 0


def test_bad_frames_and_impossible_events_are_dropped(
    pipeline: Pipeline, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    request_id = pipeline.admit(listener)
    media = (MediaRef(modality="image", path="/x", digest="d", source="s"),)
    pipeline.submit(request_id, Prompt(token_ids=(1,), media=media))
    worker.expect(m.EncodeMedia)
    for frame in (b"", b"\xc1", b"\x00" * 40):
        worker.dealer.send(frame)
    worker.send(m.MediaPlanned(request_id=request_id, attempt=0, item=99, keep_bound=1))
    until = time.monotonic() + 10
    while len(caplog.records) < 4 and time.monotonic() < until:
        pipeline.counts()  # a round trip to the thread that reads them
    pipeline.cancel(request_id)
    assert listener.wait().record.state is State.CANCELLED
    worker.expect(m.CancelRequest)
    listener = Listener()
    pipeline.submit(pipeline.admit(listener), TEXT)
    answer(worker)
    assert listener.wait().record.state is State.FINISHED
    assert len(caplog.records) == 4


def test_a_prompt_too_long_for_a_message_fails_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    worker = FakeWorker(pipeline.endpoint, slots=10**7)
    pipeline.wait_ready(10)
    long, short = Listener(), Listener()
    prompt = Prompt(token_ids=(150_000,) * 250_000, sampling=TEXT.sampling)
    pipeline.submit(pipeline.admit(long), prompt)
    pipeline.submit(pipeline.admit(short), TEXT)
    error = long.wait().record.error
    assert error is not None
    assert error.status == 413
    # told to forget what it never got
    worker.expect(m.CancelRequest)
    answer(worker)
    assert short.wait().record.state is State.FINISHED
    worker.dealer.close()


def test_a_text_that_no_worker_can_hold_is_refused_at_once(pipeline: Pipeline) -> None:
    worker = FakeWorker(pipeline.endpoint, slots=100)
    pipeline.wait_ready(10)
    listener = Listener()
    pipeline.submit(pipeline.admit(listener), Prompt(token_ids=(1,) * 97, sampling=TEXT.sampling))
    error = listener.wait().record.error
    assert error is not None
    assert (error.status, error.public_message) == (
        400,
        "Expected a prompt of at most 100 tokens with its answer, but got 101",
    )
    fitting = Listener()
    pipeline.submit(pipeline.admit(fitting), Prompt(token_ids=(1,) * 96, sampling=TEXT.sampling))
    answer(worker)
    assert fitting.wait().record.state is State.FINISHED
    worker.dealer.close()


def test_workers_are_known_by_name(pipeline: Pipeline, worker: FakeWorker) -> None:
    assert pipeline.worker_pids() == {"all-0-1": 7}
    assert pipeline.is_ready
    assert pipeline.counts()["workers_ready"] == 1
