"""Requests submitted together: in order, a few at a time, and what was started is always cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest

from mmserve.errors import BadRequest, Overloaded
from mmserve.generation import Deliver, Generation
from mmserve.offline import submission as module
from mmserve.offline.prompts import Inputs
from mmserve.offline.runtime import Request
from mmserve.offline.submission import Submission
from mmserve.request import Chunk, Methods, RequestOutput
from mmserve.sampling import SamplingParams
from tests.fake_llm import completion
from tests.offline.fakes import wait_until


def requests(count: int) -> list[Request]:
    return [
        Request(
            read=lambda _: Inputs((1,), ()),
            sampling=SamplingParams(max_tokens=place + 1),
            methods=Methods(),
        )
        for place in range(count)
    ]


class Runs:
    """Takes requests and ends them when it is told to."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.delivers: dict[int, Deliver] = {}
        self.cancelled: set[int] = set()
        self._before = before

    def submit(self, request: Request, deliver: Deliver) -> Generation:
        place = request.sampling.max_tokens - 1
        self._before(place)
        self.delivers[place] = deliver
        return cast("Generation", _Cancel(lambda: self.cancelled.add(place)))

    def end(self, place: int) -> None:
        self.delivers[place](completion(f"answer {place}"))

    def wait(self, count: int) -> None:
        wait_until(lambda: len(self.delivers) == count)


class _Cancel:
    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_outputs_are_in_order_however_they_end() -> None:
    runs, ended = Runs(), []
    chunks: list[Chunk] = []
    submission = Submission(
        runs.submit, requests(3), on_chunk=chunks.append, on_end=lambda: ended.append("one")
    )
    submission.start()
    runs.wait(3)
    runs.delivers[2](Chunk(text="an"))
    for place in (2, 0, 1):
        assert not submission.outputs.done()
        runs.end(place)
    assert texts(submission.outputs.result(1)) == ["answer 0", "answer 1", "answer 2"]
    assert [chunk.text for chunk in chunks] == ["an"]
    assert len(ended) == 3


def test_nothing_asked_is_nothing_answered() -> None:
    submission = Submission(Runs().submit, [])
    submission.start()
    assert submission.outputs.result(1) == []


def test_only_so_many_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 2)
    runs = Runs()
    submission = Submission(runs.submit, requests(5))
    submission.start()
    for place in range(5):
        runs.wait(min(place + 2, 5))
        runs.end(place)
    assert len(submission.outputs.result(1)) == 5


@pytest.mark.parametrize("error", [BadRequest("wrong"), TypeError("wrong")])
def test_the_first_error_in_order_is_raised_at_the_end(error: Exception) -> None:
    def before(place: int) -> None:
        if place == 1:
            raise error

    runs = Runs(before)
    submission = Submission(runs.submit, requests(3))
    submission.start()
    runs.wait(2)
    runs.delivers[2](Overloaded("later"))
    assert not submission.outputs.done()
    runs.end(0)
    with pytest.raises(type(error), match="wrong"):
        submission.outputs.result(1)


def test_cancelling_ends_what_runs_and_starts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 3)
    runs = Runs()
    submission = Submission(runs.submit, requests(9))
    submission.start()
    runs.wait(3)
    runs.end(0)
    runs.wait(4)
    submission.cancel()
    assert runs.cancelled == {1, 2, 3}
    wait_until(lambda: not any(thread.name == "mmserve-submit" for thread in threading.enumerate()))
    assert len(runs.delivers) == 4


def test_what_is_just_being_started_is_cancelled_too() -> None:
    starting, go_on = threading.Event(), threading.Event()

    def before(place: int) -> None:
        starting.set()
        assert go_on.wait(10)

    runs = Runs(before)
    submission = Submission(runs.submit, requests(2))
    submission.start()
    assert starting.wait(10)
    submission.cancel()
    assert runs.cancelled == set()
    go_on.set()
    wait_until(lambda: runs.cancelled == {0})
    assert len(runs.delivers) == 1
