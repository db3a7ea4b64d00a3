"""A worker without a model on a real socket: `LLM` and `AsyncLLM` around it are the real ones."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmserve import messages as m
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.offline import runtime
from mmserve.queues import Dealer
from mmserve.request import FinishReason, MediaReport
from mmserve.workers.loop import COMMANDS, EVENTS
from mmserve.workers.main import WorkerConfig

CHAT = ChatFormat.from_model_dir(resolve("tiny"))
CREDITS = m.Credits(requests=64, slots=10_000)
# values of top_k that mean something to the fake worker; STALLS gives one token and no more
FAILS, HANGS, STALLS, INTERRUPTS = 6, 7, 8, 9
ITEM_TOKENS = 3
(END_OF_TURN,) = CHAT.eos_tokens


def say(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.005)


class FakeWorker:
    """Stands in for `run_worker`: answers a prompt with one token, the last of its first turn."""

    def __init__(self) -> None:
        self.configs: list[WorkerConfig] = []
        self.prompts: list[m.PrefillPrompt] = []
        self.media: list[m.EncodeMedia] = []
        self.cancelled: list[str] = []
        self.number = 0

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
        worker = cls()
        monkeypatch.setattr(runtime, "run_worker", worker)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        return worker

    def __call__(self, config: WorkerConfig, should_stop: Callable[[], bool]) -> None:
        self.configs.append(config)
        with Dealer(config.endpoint, config.name.encode()) as dealer:
            self.dealer, self.seen = dealer, 0
            self._emit(m.WorkerReady(roles=config.roles, pid=1, weights_revision="w", capacity=CREDITS))
            while not should_stop():
                for frame in dealer.poll(0.05):
                    downward = COMMANDS.decode(frame)
                    self.seen = max(self.seen, downward.number)
                    self.obey(downward.command)

    def obey(self, command: m.AnyCommand) -> None:
        if isinstance(command, m.EncodeMedia):
            self.media.append(command)
            self._emit(self._encoded(command))
        elif isinstance(command, m.CancelRequest):
            self.cancelled.append(command.request_id)
        elif isinstance(command, m.PrefillPrompt):
            self.prompts.append(command)
            self._prefill(command)

    def _prefill(self, command: m.PrefillPrompt) -> None:
        told = command.sampling.top_k
        if told == FAILS:
            failure = m.RequestFailed(
                request_id=command.request_id, attempt=0, code="media_error", public_message="broken"
            )
            self._emit(failure)
        elif told == INTERRUPTS:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        elif told != HANGS:
            self._emit(self._prefilled(command, None if told == STALLS else FinishReason.LENGTH))

    def _emit(self, event: m.AnyEvent) -> None:
        self.dealer.send(EVENTS.encode(m.Upward(epoch="", seen=self.seen, credits=CREDITS, event=event)))

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
            part=m.EncodedPart(lease=lease, tokens=ITEM_TOKENS, kept=ITEM_TOKENS),
            whole=m.EncodedMedia(
                cached_tokens=0,
                report=MediaReport(
                    source=command.media.source,
                    frames=1,
                    timestamps_s=(0.0,),
                    lost_frames=0,
                    width=4,
                    height=4,
                ),
                times=m.EncodeTimes(queue=0, decode=0, preprocess=0, encode=0, prune=0, publish=0),
            ),
        )

    def _prefilled(self, command: m.PrefillPrompt, finish: FinishReason | None) -> m.PromptPrefilled:
        ids = command.token_ids
        return m.PromptPrefilled(
            request_id=command.request_id,
            attempt=command.attempt,
            first=m.Sampled(
                request_id=command.request_id,
                attempt=command.attempt,
                seq=0,
                token_id=ids[ids.index(END_OF_TURN) - 1] if END_OF_TURN in ids else ids[-1],
                finish=finish,
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
