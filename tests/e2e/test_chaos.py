"""R21, R23, R24, R26: a worker killed at any time costs time, never an answer."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from mmserve.errors import MMServeError
from mmserve.evaluation.suites import Example
from mmserve.generation import Deliver
from mmserve.llm import LLM
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams

from .conftest import ask

REQUESTS = 20
# long answers, so that a kill finds requests in every stage
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
DEADLINE_S = 120.0


class Crowd:
    """20 concurrent requests; `after(n)` waits until n tokens have been streamed in total."""

    def __init__(self, llm: LLM, clips: list[tuple[Path, Example]]) -> None:
        self._news = threading.Condition()
        self._tokens = 0
        self.results: dict[int, RequestOutput | MMServeError] = {}
        for number in range(REQUESTS):
            clip, example = clips[number]
            llm.submit(ask(clip, example.question.text), PARAMS, deliver=self._listener(number))

    def _listener(self, number: int) -> Deliver:
        def deliver(news: Chunk | RequestOutput | MMServeError) -> None:
            with self._news:
                if isinstance(news, Chunk):
                    self._tokens += len(news.token_ids)
                else:
                    assert number not in self.results, "a request ended twice"
                    self.results[number] = news
                self._news.notify_all()

        return deliver

    def after(self, tokens: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self._tokens >= tokens, DEADLINE_S)

    def answers(self) -> list[tuple[int, ...]]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.results) == REQUESTS, DEADLINE_S)
        errors = [result for result in self.results.values() if not isinstance(result, RequestOutput)]
        assert not errors, errors
        return [
            result.outputs[0].token_ids
            for _, result in sorted(self.results.items())
            if isinstance(result, RequestOutput)
        ]


@pytest.fixture(scope="module")
def undisturbed(epd: LLM, basic_clips: list[tuple[Path, Example]]) -> list[tuple[int, ...]]:
    return Crowd(epd, basic_clips).answers()


def _killed_once(
    llm: LLM, clips: list[tuple[Path, Example]], role: str, tokens: int
) -> list[tuple[int, ...]]:
    """Answers of a crowd during which the worker of a role is killed after so many tokens."""
    crowd = Crowd(llm, clips)
    crowd.after(tokens)
    pids = llm.worker_pids()
    victims = [pid for name, pid in pids.items() if name.startswith(role)]
    assert victims, f"no {role} worker among {sorted(pids)}"
    os.kill(victims[0], signal.SIGKILL)
    return crowd.answers()


def test_three_kills_in_a_row_lose_no_answer(
    epd: LLM, basic_clips: list[tuple[Path, Example]], undisturbed: list[tuple[int, ...]]
) -> None:
    for role, tokens in (("encode", 0), ("prefill", 100), ("decode", 300)):
        assert _killed_once(epd, basic_clips, role, tokens) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("role", ["encode", "prefill", "decode"])
def test_killing_one_role_three_times_in_a_row_loses_no_answer(
    epd: LLM, basic_clips: list[tuple[Path, Example]], undisturbed: list[tuple[int, ...]], role: str
) -> None:
    for tokens in (0, 100, 300):
        assert _killed_once(epd, basic_clips, role, tokens) == undisturbed
