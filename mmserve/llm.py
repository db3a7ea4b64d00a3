"""`LLM`: the Python API. All stages in this process, or one process per stage with `epd`.

Knows nothing about HTTP. Safe to use from scripts without a main guard and from notebooks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec
import numpy as np

from mmserve.config import CacheSizes, Dtype, MethodDefaults, ServeConfig
from mmserve.conversation import MediaPart, parse
from mmserve.errors import BadRequest, MMServeError
from mmserve.generation import Deliver, Generation
from mmserve.media.arrays import save_frames
from mmserve.media.fetch import Fetcher
from mmserve.messages import Role
from mmserve.methods import choose_methods
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.progress import progress_bar
from mmserve.queues import ipc_endpoint
from mmserve.request import (
    Chunk,
    Completion,
    FinishReason,
    MediaOptions,
    MediaRef,
    MediaReport,
    Methods,
    Prompt,
    Timings,
    Usage,
)
from mmserve.rundir import RunDir
from mmserve.sampling import Logprob, SamplingParams
from mmserve.workers.main import WorkerConfig, run_worker
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.supervisor import Supervisor, worker_configs

START_TIMEOUT_S = 600.0
NO_DEADLINE_S = 1e9  # offline work takes what it takes
MAX_IN_FLIGHT = 64  # conversations of one `chat` call that run at the same time

Messages = Sequence[Mapping[str, Any]]


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One generated answer, as in vLLM."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[dict[int, Logprob], ...] | None = None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one conversation, as in vLLM, with what was sampled, counted and timed."""

    request_id: str
    outputs: tuple[CompletionOutput, ...]
    prompt_token_ids: tuple[int, ...]
    usage: Usage
    timings_ms: Timings
    media: tuple[MediaReport, ...]
    methods: Methods


class LLM:
    """A running pipeline. Use it as a context manager, or call `close`.

    `model` is "tiny", a local Hugging Face directory or a hub name. `epd` is the number of encode,
    prefill and decode processes, None runs every stage on a thread of this process. `kv_memory` is
    bytes of KV pages per language worker. Method names are those of the command line.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        prune: str = "none",
        keep: float = 1.0,
        attention: str = "dense",
        kv: str = "none",
        kv_budget: float | None = None,
        kv_dtype: str = "auto",
        dtype: Dtype = "auto",
        epd: tuple[int, int, int] | None = None,
        kv_memory: int | None = None,
        threads: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.methods = choose_methods(
            MethodDefaults(),
            prune=prune,
            keep=keep,
            attention=attention,
            kv=kv,
            kv_budget=kv_budget,
            kv_dtype=kv_dtype,
        )
        self.options = MediaOptions(num_frames=num_frames, fps=fps)
        self._seed = seed
        path = resolve(model)
        self.chat_format = ChatFormat.from_model_dir(path)
        cache = CacheSizes() if kv_memory is None else CacheSizes(kv_memory_bytes=kv_memory)
        config = ServeConfig(
            model=str(path),
            epd=epd or (1, 1, 1),
            dtype=dtype,
            threads=threads,
            cache=cache,
        )
        self._stopping = threading.Event()
        self._run_dir = RunDir()
        self._fetcher = Fetcher(directory=self._run_dir.path)
        endpoint = ipc_endpoint(self._run_dir.path)
        self._pipeline = Pipeline(
            endpoint, self._run_dir.directories, max_active=2**20, deadline_s=NO_DEADLINE_S
        )
        configs = worker_configs(config, endpoint, [str(d) for d in self._run_dir.directories])
        self._thread = threading.Thread(
            target=self._run_here if epd is None else self._supervise,
            args=(_colocated(configs, threads) if epd is None else configs,),
            name="mmserve-workers",
            daemon=True,
        )
        self._thread.start()
        try:
            self._pipeline.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _run_here(self, configs: list[WorkerConfig]) -> None:
        try:
            # slow to import, and here only; threads are counted per calling thread
            import torch

            torch.set_num_threads(configs[0].threads)
            run_worker(configs[0], self._stopping.is_set)
        except Exception as error:  # reported to whoever waits for the pipeline
            known = error if isinstance(error, MMServeError) else MMServeError(f"The worker failed: {error}")
            self._pipeline.report_failure(known)

    def _supervise(self, configs: list[WorkerConfig]) -> None:
        supervisor = Supervisor(configs, lambda text: self._pipeline.report_failure(MMServeError(text)))
        try:
            supervisor.run(self._stopping.is_set)
        except Exception as error:  # reported to whoever waits for the pipeline
            self._pipeline.report_failure(MMServeError(f"The supervisor failed: {error}"))

    # requests

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        methods: Methods | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; raises the first error after all have ended."""
        conversations = _conversations(messages)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling = [sampling_params or SamplingParams()] * len(conversations)
        else:
            sampling = list(sampling_params)
        if len(sampling) != len(conversations):
            raise BadRequest(
                f"Expected sampling_params for {len(conversations)} conversations, but got {len(sampling)}"
            )
        places = threading.Semaphore(MAX_IN_FLIGHT)
        with progress_bar(len(conversations), "answering", shown=progress) as advance:

            def done() -> None:
                places.release()
                advance()

            answers = []
            for conversation, params in zip(conversations, sampling, strict=True):
                places.acquire()
                answers.append(self._start(conversation, params, methods, done))
            wait(answers)
            return [_output(answer.result()) for answer in answers]

    def _start(
        self,
        conversation: Messages,
        sampling: SamplingParams,
        methods: Methods | None,
        done: Callable[[], None],
    ) -> Future[Completion]:
        answer: Future[Completion] = Future()

        def deliver(news: Chunk | Completion | MMServeError) -> None:
            if isinstance(news, Chunk):
                return
            if isinstance(news, Completion):
                answer.set_result(news)
            else:
                answer.set_exception(news)
            done()

        try:
            self.submit(conversation, sampling, methods=methods, deliver=deliver)
        except MMServeError as error:
            deliver(error)
        return answer

    def submit(
        self,
        messages: Messages,
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        methods: Methods | None = None,
        options: MediaOptions | None = None,
    ) -> Generation:
        """Start one conversation; `deliver` gets chunks, then one completion or error, on another thread."""
        conversation = parse(messages, options=options or self.options, on_this_host=True)
        if sampling_params.seed is None and self._seed is not None:
            sampling_params = msgspec.structs.replace(sampling_params, seed=self._seed)
        token_ids = tuple(self.chat_format.encode(conversation.messages))
        held: list[MediaRef] = []

        def release_and_deliver(news: Chunk | Completion | MMServeError) -> None:
            if not isinstance(news, Chunk):
                for ref in held:
                    self._fetcher.release(ref)
            deliver(news)

        generation = Generation(self._pipeline, self.chat_format, release_and_deliver)
        started_at = time.perf_counter()
        try:
            for part in conversation.media:
                held.append(self._resolve(part))
        except MMServeError as error:
            generation.fail(error)
            return generation
        except BaseException:
            generation.cancel()  # nothing else would ever end it
            raise
        fetch_ms = (time.perf_counter() - started_at) * 1e3
        chosen = methods or self.methods
        prompt = Prompt(token_ids=token_ids, media=tuple(held), sampling=sampling_params, methods=chosen)
        generation.start(prompt, fetch_ms)
        return generation

    def _resolve(self, part: MediaPart) -> MediaRef:
        content = part.content
        if isinstance(content, str | Path):
            found = self._fetcher.resolve(str(content), part.modality)
        else:
            # a PIL image becomes an array by itself
            pixels = np.asarray(content.convert("RGB") if hasattr(content, "convert") else content)
            found = save_frames(pixels, self._run_dir.path, part.modality, part.fps)
        return msgspec.structs.replace(found, options=part.options)

    def worker_pids(self) -> dict[str, int]:
        """Process ids of the workers by name, for monitoring."""
        return self._pipeline.worker_pids()

    # life

    def close(self) -> None:
        """Stop the workers and remove everything on disk. Idempotent."""
        if self._stopping.is_set():
            return
        self._pipeline.close()
        self._stopping.set()
        self._thread.join()
        self._run_dir.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """A list of messages is one conversation, a list of such lists several."""
    if not messages or isinstance(messages[0], Mapping):
        return [cast("Messages", messages)]
    return list(cast("Sequence[Messages]", messages))


def _colocated(configs: list[WorkerConfig], threads: int | None) -> list[WorkerConfig]:
    """One worker with every role and, unless told otherwise, all the cores."""
    cores = threads or os.cpu_count() or 1
    return [msgspec.structs.replace(configs[0], name="all-0-0", roles=tuple(Role), threads=cores)]


def _output(completion: Completion) -> RequestOutput:
    answer = CompletionOutput(
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        logprobs=completion.logprobs,
    )
    return RequestOutput(
        request_id=completion.request_id,
        outputs=(answer,),
        prompt_token_ids=completion.prompt_token_ids,
        usage=completion.usage,
        timings_ms=completion.timings_ms,
        media=completion.media,
        methods=completion.methods,
    )
