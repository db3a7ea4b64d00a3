"""How the pipeline behind `LLM` starts and ends: every failure is told, and nothing is left."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmserve import messages as m
from mmserve.errors import ConfigError, MMServeError, Unavailable
from mmserve.llm import LLM
from mmserve.messages import Role
from mmserve.offline import runtime
from mmserve.sampling import SamplingParams
from mmserve.workers.main import WorkerConfig
from tests.offline.fakes import HANGS, FakeWorker, say, wait_until


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return FakeWorker.installed(monkeypatch)


def test_close_ends_what_still_runs_and_removes_everything(worker: FakeWorker) -> None:
    llm = LLM()
    directories = llm._runtime._run_dir.directories
    ended: list[object] = []
    llm.submit(say("red"), SamplingParams(top_k=HANGS), deliver=ended.append)
    llm.close()
    llm.close()
    (error,) = ended
    assert isinstance(error, Unavailable)
    assert not any(directory.exists() for directory in directories)
    with pytest.raises(Unavailable):
        llm.chat(say("red"))
    assert not llm._runtime._thread.is_alive()


def test_closing_on_another_thread_ends_who_waits(worker: FakeWorker) -> None:
    llm = LLM()
    closing = threading.Thread(target=llm.close)
    worker.obey = lambda command: closing.start() if isinstance(command, m.PrefillPrompt) else None  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        llm.chat(say("red"))
    closing.join(10)


def test_what_nobody_refers_to_any_more_is_closed(worker: FakeWorker) -> None:
    llm = LLM()
    llm.chat(say("red"))
    directories = llm._runtime._run_dir.directories
    del llm
    gc.collect()
    wait_until(lambda: not any(directory.exists() for directory in directories))


# starting


def test_one_worker_has_every_role_and_the_threads_asked_for(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with LLM(threads=3, kv_memory=1 << 20, max_num_batched_tokens=7) as running:
        assert running.worker_pids() == {"all-0-0": 1}
    (config,) = worker.configs
    assert config.roles == tuple(Role)
    assert config.threads == 3
    assert threads == [3]
    assert (config.kv_memory_bytes, config.max_num_batched_tokens) == (1 << 20, 7)


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

    monkeypatch.setattr(runtime, "run_worker", run_worker)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(expected, match=words):
        LLM()
    assert not closed[0].exists()


def test_a_worker_that_dies_later_fails_what_runs_and_what_comes(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obey(command: m.AnyCommand) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker, "obey", obey)
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

    monkeypatch.setattr(runtime, "Supervisor", Broken)
    with pytest.raises(MMServeError, match="The supervisor failed: no more processes"):
        LLM(epd=(1, 1, 1))


def test_a_worker_given_up_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hopeless:
        def __init__(self, configs: list[WorkerConfig], give_up: Callable[[str], None]) -> None:
            self.give_up = give_up

        def run(self, should_stop: Callable[[], bool]) -> None:
            self.give_up("Worker decode-0 died too often to be started again")

    monkeypatch.setattr(runtime, "Supervisor", Hopeless)
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
