"""LLM around a fake worker on a real socket: conversations in, results in order, every failure told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmserve import llm as module
from mmserve import messages as m
from mmserve.errors import BadRequest, ConfigError, MediaError, MMServeError, Unavailable
from mmserve.llm import LLM
from mmserve.messages import Role
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.queues import Dealer
from mmserve.request import Chunk, Completion, FinishReason, MediaReport, Methods
from mmserve.sampling import SamplingParams
from mmserve.workers.loop import COMMANDS, EVENTS
from mmserve.workers.main import WorkerConfig

CREDITS = m.Credits(requests=64, slots=10_000)
FAILS, HANGS = 6, 7  # values of top_k that mean something to the fake worker
ITEM_TOKENS = 3
(END_OF_TURN,) = ChatFormat.from_model_dir(resolve("tiny")).eos_tokens


class FakeWorker:
    """Stands in for `run_worker`: answers a prompt with one token, the last of its first turn."""

    def __init__(self) -> None:
        self.configs: list[WorkerConfig] = []
        self.prompts: list[m.PrefillPrompt] = []
        self.media: list[m.EncodeMedia] = []
        self.held: list[Callable[[], None]] = []
        self.number = 0

    def __call__(self, config: WorkerConfig, should_stop: Callable[[], bool]) -> None:
        self.configs.append(config)
        with Dealer(config.endpoint, config.name.encode()) as dealer:
            self.dealer, self.seen = dealer, 0
            self._emit(m.WorkerReady(roles=config.roles, pid=1, weights_revision="w", capacity=CREDITS))
            while not should_stop():
                for frame in dealer.poll(0.05):
                    downward = COMMANDS.decode(frame)
                    self.seen = max(self.seen, downward.number)
                    self._obey(downward.command)

    def _emit(self, event: m.AnyEvent) -> None:
        self.dealer.send(EVENTS.encode(m.Upward(epoch="", seen=self.seen, credits=CREDITS, event=event)))

    def _obey(self, command: m.AnyCommand) -> None:
        if isinstance(command, m.EncodeMedia):
            self.media.append(command)
            self._emit(self._encoded(command))
        elif isinstance(command, m.PrefillPrompt):
            self.prompts.append(command)
            if command.sampling.top_k == FAILS:
                failure = m.RequestFailed(
                    request_id=command.request_id, attempt=0, code="media_error", public_message="broken"
                )
                self._emit(failure)
            elif command.sampling.top_k != HANGS:
                self._emit(self._prefilled(command))

    def _encoded(self, command: m.EncodeMedia) -> m.MediaEncoded:
        self.number += 1
        lease = m.Lease(
            lease_id=f"{self.number:032x}",
            path=f"/nowhere/{self.number}",
            total_bytes=1,
            arrays=(),
            checksum=0,
        )
        return m.MediaEncoded(
            request_id=command.request_id,
            attempt=command.attempt,
            item=command.item,
            encoded=m.EncodedItem(lease=lease, tokens=ITEM_TOKENS, kept=ITEM_TOKENS),
            cached_tokens=0,
            report=MediaReport(
                source=command.media.source, frames=1, timestamps_s=(0.0,), lost_frames=0, width=4, height=4
            ),
            times=m.EncodeTimes(queue=0, decode=0, preprocess=0, encode=0, prune=0, publish=0),
        )

    def _prefilled(self, command: m.PrefillPrompt) -> m.PromptPrefilled:
        return m.PromptPrefilled(
            request_id=command.request_id,
            attempt=command.attempt,
            first=m.Sampled(
                request_id=command.request_id,
                attempt=command.attempt,
                seq=0,
                token_id=command.token_ids[command.token_ids.index(END_OF_TURN) - 1],
                finish=FinishReason.LENGTH,
            ),
            lease=None,
            next_order=1,
            next_position=1,
            slots=1,
            kv_bytes=1,
            kv_bytes_uncompressed=1,
            queue_ms=0,
            transfer_ms=0,
            prefill_ms=0,
        )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    made = FakeWorker()
    monkeypatch.setattr(module, "run_worker", made)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return made


@pytest.fixture
def llm(worker: FakeWorker) -> Iterator[LLM]:
    with LLM(seed=5, prune="uniform", keep=0.5) as running:
        yield running


def say(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


WORDS = ["red", "blue", "square", "left", "yes", "no"]


def test_answers_come_in_the_order_of_their_conversations(llm: LLM) -> None:
    outputs = llm.chat([say(word) for word in WORDS], progress=True)
    assert [output.outputs[0].text for output in outputs] == WORDS
    assert outputs[0].outputs[0].finish_reason is FinishReason.LENGTH
    assert len({output.request_id for output in outputs}) == len(WORDS)


def test_one_conversation_is_a_list_of_messages(llm: LLM, worker: FakeWorker) -> None:
    (output,) = llm.chat([*say("red"), {"role": "assistant", "content": "x"}, *say("blue")])
    assert output.outputs[0].text == "red"
    assert len(worker.prompts) == 1
    assert output.prompt_token_ids == worker.prompts[0].token_ids


def test_more_conversations_than_places_are_all_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 3)
    assert [o.outputs[0].text for o in llm.chat([say(word) for word in WORDS * 4])] == WORDS * 4


def test_sampling_and_methods_reach_the_worker(llm: LLM, worker: FakeWorker) -> None:
    params = [SamplingParams(max_tokens=n, seed=n or None) for n in (1, 2)]
    llm.chat([say("red"), say("blue")], params)
    llm.chat(say("yes"), methods=Methods(kv="snapkv"))
    llm.chat(say("no"))
    assert [prompt.sampling.max_tokens for prompt in worker.prompts] == [1, 2, 64, 64]
    assert [prompt.sampling.seed for prompt in worker.prompts] == [1, 2, 5, 5]
    assert [prompt.methods.kv for prompt in worker.prompts] == ["none", "none", "snapkv", "none"]
    assert [prompt.methods.prune for prompt in worker.prompts] == ["uniform", "uniform", "none", "uniform"]


def test_sampling_for_another_number_of_conversations_is_refused_before_any_starts(
    llm: LLM, worker: FakeWorker
) -> None:
    with pytest.raises(BadRequest, match="for 2 conversations, but got 3"):
        llm.chat([say("red"), say("blue")], [SamplingParams()] * 3)
    assert not worker.prompts


def test_the_first_error_is_raised_when_all_have_ended(llm: LLM, worker: FakeWorker) -> None:
    params = [SamplingParams(top_k=FAILS), *[SamplingParams()] * 4, SamplingParams(top_k=FAILS)]
    with pytest.raises(MediaError, match="broken"):
        llm.chat([say(word) for word in WORDS], params)
    assert len(worker.prompts) == 6
    assert llm._pipeline.counts()["active"] == 0
    with pytest.raises(BadRequest, match=r"messages\[0\]"):
        llm.chat([say("red"), [{"role": "nobody", "content": "x"}]])
    assert llm._pipeline.counts()["active"] == 0


def test_media_of_this_host_reach_the_encoder(llm: LLM, worker: FakeWorker, tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (output,) = llm.chat(
        say(
            "red",
            {"type": "image", "image": tmp_path / "a.png"},
            {"type": "image", "image": Image.fromarray(pixels)},
            {"type": "video", "video": np.stack([pixels] * 3), "fps": 2.0},
        )
    )
    by_item = sorted(worker.media, key=lambda command: command.item)
    assert [command.media.modality for command in by_item] == ["image", "image", "video"]
    assert not any(command.is_only_image for command in by_item)
    assert by_item[0].media.path == str(tmp_path / "a.png")
    assert np.array_equal(np.load(by_item[1].media.path)[0], pixels)
    assert by_item[2].media.array_fps == 2.0
    assert len(output.media) == 3
    assert output.usage.visual_tokens == 3 * ITEM_TOKENS
    assert len(output.prompt_token_ids) == len(worker.prompts[0].token_ids) - 3 + 3 * ITEM_TOKENS


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image", "image": "/nowhere/at/all.png"}, MMServeError),
        ({"type": "image", "image": np.zeros((4, 4), np.uint8)}, BadRequest),
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8)}, BadRequest),
        # not one of our errors: the caller's own mistake in Python
        ({"type": "video", "video": np.zeros((2, 4, 4, 3), np.uint8), "fps": "2"}, TypeError),
    ],
)
def test_media_that_cannot_be_had_end_their_request(
    llm: LLM, part: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        llm.chat(say("red", part))
    assert llm._pipeline.counts()["active"] == 0
    assert llm.chat(say("red"))[0].outputs[0].text == "red"


def test_submit_delivers_chunks_and_then_one_completion(llm: LLM) -> None:
    news: list[Chunk | Completion | MMServeError] = []
    ended = threading.Event()

    def deliver(item: Chunk | Completion | MMServeError) -> None:
        news.append(item)
        if not isinstance(item, Chunk):
            ended.set()

    generation = llm.submit(say("square"), SamplingParams(), deliver=deliver)
    assert ended.wait(10)
    chunk, completion = news
    assert isinstance(chunk, Chunk)
    assert isinstance(completion, Completion)
    assert chunk.text == completion.text == "square"
    assert completion.request_id == generation.request_id


def test_close_ends_what_still_runs_and_removes_everything(worker: FakeWorker) -> None:
    llm = LLM()
    directories = llm._run_dir.directories
    ended: list[object] = []
    llm.submit(say("red"), SamplingParams(top_k=HANGS), deliver=ended.append)
    llm.close()
    llm.close()
    (error,) = ended
    assert isinstance(error, Unavailable)
    assert not any(directory.exists() for directory in directories)
    with pytest.raises(Unavailable):
        llm.chat(say("red"))
    assert not llm._thread.is_alive()


# starting


def test_one_worker_has_every_role_and_the_threads_asked_for(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with LLM(threads=3, kv_memory=1 << 20) as running:
        assert running.worker_pids() == {"all-0-0": 1}
    (config,) = worker.configs
    assert config.roles == tuple(Role)
    assert config.threads == 3
    assert threads == [3]
    assert config.kv_memory_bytes == 1 << 20


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ConfigError("Expected safetensors"), ConfigError, "Expected safetensors"),
        (OSError("disk"), MMServeError, "The worker failed: disk"),
    ],
)
def test_a_worker_that_cannot_start_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[MMServeError], words: str
) -> None:
    closed: list[Path] = []

    def run_worker(config: WorkerConfig, should_stop: Callable[[], bool]) -> None:
        closed.append(Path(config.directories[-1]))
        raise raised

    monkeypatch.setattr(module, "run_worker", run_worker)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(expected, match=words):
        LLM()
    assert not closed[0].exists()


def test_a_worker_that_dies_later_fails_what_runs_and_what_comes(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obey(command: m.AnyCommand) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker, "_obey", obey)
    with LLM() as running:
        for _ in range(2):
            with pytest.raises(MMServeError, match="The worker failed: out of memory"):
                running.chat(say("red"))


def test_a_supervisor_that_fails_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, configs: list[WorkerConfig], give_up: Callable[[str], None]) -> None:
            assert [config.name for config in configs] == ["encode-0", "prefill-0", "decode-0"]

        def run(self, should_stop: Callable[[], bool]) -> None:
            raise OSError("no more processes")

    monkeypatch.setattr(module, "Supervisor", Broken)
    with pytest.raises(MMServeError, match="The supervisor failed: no more processes"):
        LLM(epd=(1, 1, 1))


def test_a_worker_given_up_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hopeless:
        def __init__(self, configs: list[WorkerConfig], give_up: Callable[[str], None]) -> None:
            self.give_up = give_up

        def run(self, should_stop: Callable[[], bool]) -> None:
            self.give_up("Worker decode-0 died too often to be started again")

    monkeypatch.setattr(module, "Supervisor", Hopeless)
    with pytest.raises(MMServeError, match="died too often"):
        LLM(epd=(1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": "magic"}, "prune to be one of"),
        ({"keep": 0.0}, "keep"),
        ({"model": "no such model"}, "Expected a model directory"),
        ({"threads": 0}, "threads"),
        ({"epd": (0, 1, 1)}, "epd"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    changes: dict[str, Any], words: str, worker: FakeWorker
) -> None:
    with pytest.raises(MMServeError, match=words):
        LLM(**changes)
    assert not worker.configs
