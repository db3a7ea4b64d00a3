"""A side of a benchmark: it does jobs and says how long they took. Each runs in a process of its own.

So one side's threads, memory and libraries cannot disturb the other's, and its peak of memory is its
own. Jobs and outcomes are JSON lines. Knows nothing about what is measured for which purpose.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import IO, Literal, Protocol, Self

import msgspec

from mmserve.bench.memory import FilesWatch, peak_bytes
from mmserve.bench.requests import Ask
from mmserve.errors import MMServeError
from mmserve.request import Methods

SIDES = {
    "mmserve": "mmserve.bench.ours:OurSide",
    "transformers": "mmserve.bench.peers.transformers:TransformersSide",
}
PEERS = tuple(name for name in SIDES if name != "mmserve")


class SideConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`dtype` "auto" is what the side runs fastest in, "float32" is for comparing numbers."""

    checkpoint: str
    dtype: Literal["auto", "float32"] = "auto"
    threads: int | None = None  # None takes all cores
    kv_memory: int | None = None  # bytes of KV pages, where a side has pages
    methods: Methods = Methods()  # of mmserve's side


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` are generated for every request, greedily and past any end.

    "one_by_one" and "together" time the whole of it, videos in memory to last token. "decode" times a
    step of all requests together, after their prompts. "score" gives tokens and log-probabilities.
    """

    kind: Literal["one_by_one", "together", "decode", "score"]
    asks: tuple[Ask, ...]
    tokens: int = 1
    prompt_logprobs: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` of the job, or of one step; `prune_ms` of all its requests.

    What KV its first request had after prefill, and would have had without any method, is of a "decode" job.
    The rest is of a "score" job, of its first request.
    """

    seconds: float = 0.0
    prune_ms: float = 0.0
    prompt_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    token_ids: tuple[int, ...] = ()
    candidates: dict[int, float] = {}  # log-probabilities of the likeliest first tokens
    prompt_logprobs: tuple[float, ...] = ()  # of every prompt token but the first


class Worker(Protocol):
    """What a side's process runs; made from a `SideConfig`."""

    def run(self, job: Job) -> Outcome: ...

    def close(self) -> None: ...


class Side(Worker, Protocol):
    """A worker as the benchmark sees it."""

    def peak_bytes(self) -> int:
        """The most memory that its processes, and its files in shared memory, have held so far, summed."""
        ...


OpenSide = Callable[[str, SideConfig], AbstractContextManager[Side]]


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    outcome: Outcome | None = None
    error: str | None = None


class RemoteSide:
    """A side in a process of its own; `close` ends it. Use it as a context manager."""

    def __init__(self, name: str, config: SideConfig) -> None:
        self._name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        if config.threads is not None:
            environment["OMP_NUM_THREADS"] = str(config.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmserve.bench.side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._files = FilesWatch(self._process.pid)
        try:
            self._exchange(config)
        except BaseException:
            self.close()
            raise

    def run(self, job: Job) -> Outcome:
        outcome = self._exchange(job)
        assert outcome is not None
        return outcome

    def _exchange(self, message: SideConfig | Job) -> Outcome | None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(message) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise MMServeError(f"The {self._name} side of the benchmark ended with {process.wait()}")
        try:
            reply = msgspec.json.decode(line, type=_Reply)
        except msgspec.ValidationError as error:  # JSON has no NaN, say
            raise MMServeError(f"The {self._name} side of the benchmark answered no numbers") from error
        if reply.error is not None:
            raise MMServeError(f"The {self._name} side of the benchmark failed: {reply.error}")
        return reply.outcome

    def peak_bytes(self) -> int:
        return peak_bytes(self._process.pid) + self._files.peak_bytes

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()  # it ends when nothing more can come
        except BrokenPipeError:
            process.kill()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.terminate()  # nobody waits for the job it may be doing
        self.close()


def make_worker(name: str, config: SideConfig) -> Worker:
    module, _, factory = SIDES[name].partition(":")
    worker: Worker = getattr(import_module(module), factory)(config)
    return worker


def serve(name: str, lines: IO[bytes], answers: IO[bytes]) -> None:
    """Read a configuration, then jobs, and answer each with one line, until there are no more."""

    def answer(reply: _Reply) -> None:
        answers.write(msgspec.json.encode(reply) + b"\n")
        answers.flush()

    worker: Worker | None = None
    try:
        for line in lines:
            try:
                if worker is None:
                    worker = make_worker(name, msgspec.json.decode(line, type=SideConfig))
                    answer(_Reply())
                else:
                    answer(_Reply(outcome=worker.run(msgspec.json.decode(line, type=Job))))
            except Exception as error:  # told to whoever waits for the answer, who decides what it means
                answer(_Reply(error=f"{type(error).__name__}: {error}"))
    finally:
        if worker is not None:
            worker.close()


def main() -> None:
    # an interactive interrupt goes to the whole group: the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # what a library prints must not get between the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
