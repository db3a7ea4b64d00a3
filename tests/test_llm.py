"""LLM around a fake worker on a real socket: prompts in, results in order, every failure told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmserve import messages as m
from mmserve.errors import BadRequest, MediaError, MediaNotFound, MMServeError
from mmserve.llm import LLM
from mmserve.offline import submission
from mmserve.request import Chunk, FinishReason, Methods, RequestOutput
from mmserve.sampling import SamplingParams
from tests.offline.fakes import (
    CHAT,
    FAILS,
    HANGS,
    INTERRUPTS,
    ITEM_TOKENS,
    STALLS,
    FakeWorker,
    say,
    wait_until,
)

WORDS = ["red", "blue", "square", "left", "yes", "no"]
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return FakeWorker.installed(monkeypatch)


@pytest.fixture
def llm(worker: FakeWorker) -> Iterator[LLM]:
    with LLM(seed=5, prune="uniform", keep=0.5) as running:
        yield running


def active(llm: LLM) -> int:
    return llm._runtime.pipeline.counts()["active"]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# conversations


def test_answers_come_in_the_order_of_their_conversations(llm: LLM) -> None:
    outputs = llm.chat([say(word) for word in WORDS], progress=True)
    assert texts(outputs) == WORDS
    assert outputs[0].outputs[0].finish_reason is FinishReason.LENGTH
    assert len({output.request_id for output in outputs}) == len(WORDS)


def test_one_conversation_is_a_list_of_messages(llm: LLM, worker: FakeWorker) -> None:
    (output,) = llm.chat([*say("red"), {"role": "assistant", "content": "x"}, *say("blue")])
    assert texts([output]) == ["red"]
    assert len(worker.prompts) == 1
    assert output.prompt_token_ids == worker.prompts[0].token_ids


def test_more_conversations_than_places_are_all_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "MAX_IN_FLIGHT", 3)
    assert texts(llm.chat([say(word) for word in WORDS * 4])) == WORDS * 4


def test_what_a_request_asks_for_reaches_the_worker(llm: LLM, worker: FakeWorker) -> None:
    params = [SamplingParams(max_tokens=n, seed=n or None) for n in (1, 2)]
    llm.chat([say("red"), say("blue")], params, priority=[7, 8])
    llm.chat(say("yes"), methods=Methods(kv="snapkv"), priority=9)
    llm.generate("no")
    assert [prompt.sampling.max_tokens for prompt in worker.prompts] == [1, 2, 64, 64]
    assert [prompt.sampling.seed for prompt in worker.prompts] == [1, 2, 5, 5]
    assert [prompt.priority for prompt in worker.prompts] == [7, 8, 9, 0]
    assert [prompt.methods.kv for prompt in worker.prompts] == ["none", "none", "snapkv", "none"]
    assert [prompt.methods.prune for prompt in worker.prompts] == ["uniform", "uniform", "none", "uniform"]


@pytest.mark.parametrize(
    "wrong", [{"sampling_params": [SamplingParams()] * 3}, {"priority": [1, 2, 3]}, {"priority": []}]
)
def test_settings_for_another_number_of_requests_are_refused_before_any_starts(
    llm: LLM, worker: FakeWorker, wrong: dict[str, Any]
) -> None:
    with pytest.raises(BadRequest, match=r"for 2 requests, but got [30]"):
        llm.chat([say("red"), say("blue")], **wrong)
    with pytest.raises(BadRequest, match=r"for 2 requests, but got [30]"):
        llm.generate(["a", "b"], **wrong)
    assert not worker.prompts


def test_the_first_error_is_raised_when_all_have_ended(llm: LLM, worker: FakeWorker) -> None:
    params = [SamplingParams(top_k=FAILS), *[SamplingParams()] * 4, SamplingParams(top_k=FAILS)]
    with pytest.raises(MediaError, match="broken"):
        llm.chat([say(word) for word in WORDS], params)
    assert len(worker.prompts) == 6
    assert active(llm) == 0
    with pytest.raises(BadRequest, match=r"messages\[0\]"):
        llm.chat([say("red"), [{"role": "nobody", "content": "x"}]])
    assert active(llm) == 0


def test_several_answers_to_one_prompt_come_together(llm: LLM, worker: FakeWorker) -> None:
    (output,) = llm.chat(say("red"), SamplingParams(n=3, temperature=1.0, seed=7))
    assert [(each.index, each.text) for each in output.outputs] == [(0, "red"), (1, "red"), (2, "red")]
    assert sorted(prompt.sampling.seed or 0 for prompt in worker.prompts) == [7, 8, 9]
    assert output.usage.completion_tokens == 3
    assert output.usage.prompt_tokens == len(worker.prompts[0].token_ids)


# prompts as they are


def test_prompts_are_continued_as_they_are(llm: LLM, worker: FakeWorker) -> None:
    ids = CHAT.tokenizer.encode("a blue").ids
    outputs = llm.generate(["a red", {"prompt": "the left"}, {"prompt_token_ids": ids}])
    assert texts(outputs) == [" red", " left", " blue"]
    assert worker.prompts[2].token_ids == tuple(ids)
    assert texts(llm.generate("a red", progress=True)) == [" red"]
    assert llm.generate([]) == []


def test_media_of_a_prompt_go_to_its_placeholders(llm: LLM, worker: FakeWorker) -> None:
    data = {"image": Image.fromarray(PIXELS), "video": np.stack([PIXELS] * 3)}
    (output,) = llm.generate({"prompt": "<video> and <image> red", "multi_modal_data": data})
    by_item = sorted(worker.media, key=lambda command: command.item)
    assert [command.media.modality for command in by_item] == ["video", "image"]
    assert output.usage.visual_tokens == 2 * ITEM_TOKENS
    with pytest.raises(BadRequest, match="as many image placeholders"):
        llm.generate({"prompt": "<video>", "multi_modal_data": data})


# media


def test_media_of_this_host_reach_the_encoder(llm: LLM, worker: FakeWorker, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    stored: dict[int, np.ndarray[Any, Any]] = {}
    obey = worker.obey

    def look(command: m.AnyCommand) -> None:
        if isinstance(command, m.EncodeMedia) and command.item:
            stored[command.item] = np.load(command.media.path)
        obey(command)

    worker.obey = look  # type: ignore[method-assign]  # while the files are there
    (output,) = llm.chat(
        say(
            "red",
            {"type": "image", "image": tmp_path / "a.png"},
            {"type": "image", "image": Image.fromarray(PIXELS)},
            {"type": "video", "video": np.stack([PIXELS] * 3), "fps": 2.0},
        )
    )
    by_item = sorted(worker.media, key=lambda command: command.item)
    assert [command.media.modality for command in by_item] == ["image", "image", "video"]
    assert not any(command.is_only_image for command in by_item)
    assert by_item[0].media.path == str(tmp_path / "a.png")
    assert np.array_equal(stored[1][0], PIXELS)
    assert stored[2].shape == (3, 4, 4, 3)
    assert by_item[2].media.array_fps == 2.0
    assert len(output.media) == 3
    assert output.usage.visual_tokens == 3 * ITEM_TOKENS
    assert len(output.prompt_token_ids) == len(worker.prompts[0].token_ids) - 3 + 3 * ITEM_TOKENS
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("told", [0, FAILS])
def test_arrays_are_forgotten_with_the_last_request_that_shows_them(llm: LLM, told: int) -> None:
    part = {"type": "video", "video": np.stack([PIXELS] * 3), "fps": 2.0}
    directory = llm._runtime._run_dir.path
    waiting = llm.stream(say("red", part), SamplingParams(top_k=STALLS))
    next(waiting)
    try:
        llm.chat([say("red", part)] * 3, SamplingParams(top_k=told))
    except MediaError:
        assert told == FAILS
    assert len(list(directory.glob("*.npy"))) == 1
    waiting.close()
    wait_until(lambda: not list(directory.glob("*.npy")))


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image", "image": "/nowhere/at/all.png"}, MMServeError),
        ({"type": "image", "image": np.zeros((4, 4), np.uint8)}, BadRequest),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8)}, BadRequest),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8), "fps": "2"}, BadRequest),
        ({"type": "image", "image": object()}, BadRequest),
        ({"type": "image", "uuid": "never sent"}, MediaNotFound),
        # not one of our errors: the caller's own mistake in Python
        ({"type": "image", "image": SimpleNamespace(convert=5)}, TypeError),
    ],
)
def test_media_that_cannot_be_had_end_their_request(
    llm: LLM, part: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        llm.chat(say("red", part))
    with pytest.raises(error):
        list(llm.stream(say("red", part)))
    assert active(llm) == 0
    assert texts(llm.chat(say("red"))) == ["red"]


# as it comes


def test_submit_delivers_chunks_and_then_one_output(llm: LLM) -> None:
    news: list[Chunk | RequestOutput | MMServeError] = []
    ended = threading.Event()

    def deliver(item: Chunk | RequestOutput | MMServeError) -> None:
        news.append(item)
        if not isinstance(item, Chunk):
            ended.set()

    generation = llm.submit(say("square"), SamplingParams(), deliver=deliver)
    assert ended.wait(10)
    chunk, output = news
    assert isinstance(chunk, Chunk)
    assert isinstance(output, RequestOutput)
    assert chunk.text == output.outputs[0].text == "square"
    assert output.request_id == generation.request_id


def test_a_stream_ends_with_its_answers(llm: LLM) -> None:
    (chunk,) = llm.stream(say("square"))
    assert (chunk.text, chunk.finish_reason) == ("square", FinishReason.LENGTH)
    both = list(llm.stream(say("square"), SamplingParams(n=2, temperature=1.0)))
    assert {(chunk.index, chunk.text) for chunk in both} == {(0, "square"), (1, "square")}


def test_a_stream_raises_what_its_request_ended_with(llm: LLM) -> None:
    with pytest.raises(MediaError, match="broken"):
        list(llm.stream(say("square"), SamplingParams(top_k=FAILS)))
    with pytest.raises(BadRequest, match=r"messages\[0\]"):
        list(llm.stream([{"role": "nobody", "content": "x"}]))


def test_closing_a_stream_cancels_its_request(llm: LLM, worker: FakeWorker) -> None:
    chunks = llm.stream(say("square"), SamplingParams(top_k=STALLS))
    assert next(chunks).text == "square"
    assert active(llm) == 1
    del chunks
    wait_until(lambda: active(llm) == 0)


def test_an_interrupt_cancels_what_runs_and_leaves_the_rest_usable(llm: LLM, worker: FakeWorker) -> None:
    params = [*[SamplingParams(top_k=HANGS)] * 5, SamplingParams(top_k=INTERRUPTS)]
    with pytest.raises(KeyboardInterrupt):
        llm.chat([say(word) for word in WORDS], params)
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream(say("red"), SamplingParams(top_k=INTERRUPTS)))
    # one whose start was not over yet ends right after it
    wait_until(lambda: active(llm) == 0)
    assert texts(llm.chat(say("red"))) == ["red"]
