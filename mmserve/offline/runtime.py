"""The pipeline and its workers behind `LLM` and `AsyncLLM`, and everything they leave on disk.

Knows nothing about conversations: a request reads its own prompt.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mmserve.config import ServeConfig
from mmserve.cores import usable_cores
from mmserve.errors import MMServeError
from mmserve.generation import Deliver, Generation
from mmserve.media.fetch import Fetcher
from mmserve.media.intake import Intake
from mmserve.messages import Role
from mmserve.models.chat import ChatFormat
from mmserve.offline.prompts import Inputs
from mmserve.request import Chunk, MediaRef, Methods, Prompt, RequestOutput
from mmserve.rundir import RunDir
from mmserve.sampling import SamplingParams
from mmserve.workers.main import WorkerConfig, run_worker
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.supervisor import Supervisor, meeting_point, worker_configs

START_TIMEOUT_S = 600.0
NO_DEADLINE_S = 1e9  # offline work takes what it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to answer. `read` checks and tokenizes it: it may take a while and raise BadRequest."""

    read: Callable[[ChatFormat], Inputs]
    sampling: SamplingParams
    methods: Methods
    priority: int = 0  # a lower one comes earlier
    report_tokens: bool = False
    report_attention: bool = False


class Runtime:
    """Started by its constructor; runs until `close`, or the end of the interpreter.

    `config.model` is a directory. `in_process` runs every stage on a thread of this process; otherwise a
    supervisor on that thread starts the processes of each stage. `submit` may be called from any thread.
    """

    def __init__(self, config: ServeConfig, *, in_process: bool) -> None:
        self.chat_format = ChatFormat.from_model_dir(Path(config.model))
        self._pid = os.getpid()
        self._stopping = threading.Event()
        self._closing = threading.Lock()
        self._run_dir = RunDir()
        fetcher = Fetcher(directory=self._run_dir.path)
        self._intake = Intake(fetcher, config.cache.remembered_media_bytes)
        endpoint, keys = meeting_point(config, self._run_dir.path)
        directories = self._run_dir.directories
        self.pipeline = Pipeline(endpoint, directories, max_active=2**20, deadline_s=NO_DEADLINE_S, keys=keys)
        configs = worker_configs(config, endpoint, [str(directory) for directory in directories], keys)
        self._thread = threading.Thread(
            target=self._run_here if in_process else self._supervise,
            args=(_colocated(configs, config) if in_process else configs,),
            name="mmserve-workers",
            daemon=True,
        )
        # after the parts have registered theirs, so that it runs before them
        atexit.register(self.close)
        self._thread.start()
        try:
            self.pipeline.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request, deliver: Deliver) -> Generation:
        """Start a request; `deliver` gets chunks, then one output or error, on another thread.

        Raises what is wrong with the prompt, or that nothing is taken any more, and delivers nothing
        then; what is wrong with media is delivered.
        """
        inputs = request.read(self.chat_format)
        held: list[MediaRef] = []

        def release_and_deliver(news: Chunk | RequestOutput | MMServeError) -> None:
            if not isinstance(news, Chunk):
                self._release(held)
            deliver(news)

        generation = Generation(self.pipeline, self.chat_format, request.sampling, release_and_deliver)
        started_at = time.perf_counter()
        try:
            for part in inputs.media:
                held.append(self._intake.resolve(part))
        except MMServeError as error:
            generation.fail(error)
            return generation
        except BaseException:
            generation.drop()  # nothing else would ever end it
            self._release(held)
            raise
        prompt = Prompt(
            token_ids=inputs.token_ids,
            media=tuple(held),
            sampling=request.sampling,
            methods=request.methods,
            priority=request.priority,
            report_tokens=request.report_tokens,
            report_attention=request.report_attention,
        )
        generation.start(prompt, fetch_ms=(time.perf_counter() - started_at) * 1e3)
        return generation

    def _release(self, held: Sequence[MediaRef]) -> None:
        for ref in held:
            self._intake.release(ref)

    def close(self) -> None:
        """Stop the workers and remove everything on disk. Idempotent, and harmless in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._closing:  # who comes second waits, or goes on where the first was interrupted
            self.pipeline.close()
            self._stopping.set()
            self._thread.join()
            self._run_dir.close()
            atexit.unregister(self.close)

    def close_elsewhere(self) -> None:
        """`close` for the garbage collector, which may run on a thread that would wait for itself."""
        if not self._stopping.is_set() and os.getpid() == self._pid:
            threading.Thread(target=self.close, name="mmserve-close").start()

    # the thread

    def _run_here(self, configs: list[WorkerConfig]) -> None:
        try:
            # slow to import, and here only; threads are counted per calling thread
            import torch

            torch.set_num_threads(configs[0].threads)
            run_worker(configs[0], self._stopping.is_set)
        except Exception as error:  # reported to whoever waits for the pipeline
            known = error if isinstance(error, MMServeError) else MMServeError(f"The worker failed: {error}")
            self.pipeline.report_failure(known)

    def _supervise(self, configs: list[WorkerConfig]) -> None:
        supervisor = Supervisor(configs, lambda text: self.pipeline.report_failure(MMServeError(text)))
        try:
            supervisor.run(self._stopping.is_set)
        except Exception as error:  # reported to whoever waits for the pipeline
            self.pipeline.report_failure(MMServeError(f"The supervisor failed: {error}"))


def _colocated(configs: list[WorkerConfig], config: ServeConfig) -> list[WorkerConfig]:
    """One worker with every role, and with all the cores and memory that are given."""
    return [
        msgspec.structs.replace(
            configs[0],
            name="all-0-0",
            roles=tuple(Role),
            threads=config.threads or usable_cores(),
            gpu_memory_utilization=config.cache.gpu_memory_utilization,
        )
    ]
