"""A long video in segments: prefilled while it is encoded, on several encode workers, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest

from mmserve.errors import MMServeError
from mmserve.generation import Deliver
from mmserve.llm import LLM
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams

T = TypeVar("T")
FRAMES = 96
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)


def conversation(seed: int) -> list[dict[str, Any]]:
    frames = np.random.default_rng(seed).integers(0, 256, (FRAMES, 48, 48, 3), dtype=np.uint8)
    video = {"type": "video", "video": frames, "fps": 4.0}
    return [{"role": "user", "content": [video, {"type": "text", "text": "What colour is the star?"}]}]


@pytest.fixture(scope="module")
def two_encoders() -> Iterator[LLM]:
    with LLM(epd=(2, 1, 1), threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def expected(llm: LLM) -> dict[int, RequestOutput]:
    """Of one process, which encodes an item on its own."""
    return {seed: llm.chat(conversation(seed), PARAMS)[0] for seed in (1, 2, 3)}


def check(found: RequestOutput, expected: RequestOutput) -> None:
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert found.usage.visual_tokens == found.usage.visual_tokens_kept == expected.usage.visual_tokens
    assert found.media == expected.media
    assert found.outputs[0].logprobs is not None
    assert expected.outputs[0].logprobs is not None
    for mine, theirs in zip(found.outputs[0].logprobs, expected.outputs[0].logprobs, strict=True):
        assert [one.logprob for one in mine.values()] == pytest.approx(
            [one.logprob for one in theirs.values()], abs=1e-4
        )


def test_two_encode_workers_give_the_answer_of_one(
    two_encoders: LLM, expected: dict[int, RequestOutput]
) -> None:
    (output,) = two_encoders.chat(conversation(1), PARAMS)
    check(output, expected[1])
    times = output.timings_ms
    parts = times.fetch + times.decode + times.preprocess + times.encode + times.prune
    parts += times.transfer + times.queue + times.prefill + times.other
    assert parts == pytest.approx(times.ttft, abs=1.0)


@pytest.mark.parametrize(("victim", "seed"), [("owner", 2), ("helper", 3)])
def test_killing_either_encode_worker_midway_changes_nothing(
    two_encoders: LLM, expected: dict[int, RequestOutput], victim: str, seed: int
) -> None:
    answer: list[RequestOutput | MMServeError] = []
    done = threading.Event()
    deliver: Deliver = _into(answer, done)
    pids = _until(lambda: _encoders(two_encoders))
    retries = two_encoders._runtime.pipeline.counts().get("retries", 0)
    two_encoders.submit(conversation(seed), PARAMS, deliver=deliver)
    os.kill(pids[_until(lambda: _midway(two_encoders))[victim]], signal.SIGKILL)
    assert done.wait(120)
    (output,) = answer
    assert isinstance(output, RequestOutput), output
    check(output, expected[seed])
    counts = two_encoders._runtime.pipeline.counts()
    assert counts.get("retries", 0) == retries + 1, "it had nothing to do any more"


def _midway(llm: LLM) -> dict[str, str] | None:
    """Who encodes the only item that is encoded now, once some of it is done and some of it is not."""
    pipeline = llm._runtime.pipeline
    records = pipeline._call(lambda: list(pipeline._dispatcher.records.values()))
    for item in (item for record in records for item in record.items):
        if item.parts and item.worker is not None and item.helpers:
            return {"owner": item.worker, "helper": next(iter(item.helpers))}
    return None


def _encoders(llm: LLM) -> dict[str, int] | None:
    """Processes of the encode workers, while both run."""
    found = {name: pid for name, pid in llm.worker_pids().items() if name.startswith("encode")}
    return found if len(found) == 2 else None


def _until(look: Callable[[], dict[str, T] | None]) -> dict[str, T]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (found := look()) is not None:
            return found
        time.sleep(0.002)
    raise AssertionError("it does not come")


def _into(answer: list[RequestOutput | MMServeError], done: threading.Event) -> Deliver:
    def deliver(news: Chunk | RequestOutput | MMServeError) -> None:
        if not isinstance(news, Chunk):
            answer.append(news)
            done.set()

    return deliver
