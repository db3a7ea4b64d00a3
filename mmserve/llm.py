"""`LLM` and `AsyncLLM`: the Python API. All stages in this process, or one process per stage with `epd`.

Knows nothing about HTTP. Safe to use from scripts without a main guard and from notebooks.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack, cast

import msgspec

from mmserve.config import CacheSizes, Dtype, KVDtype, MethodDefaults, ServeConfig
from mmserve.errors import BadRequest
from mmserve.generation import Deliver, Generation
from mmserve.media.options import media_options
from mmserve.methods import MethodOptions, check_kv_dtype, choose_methods
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.offline.prompts import (
    Inputs,
    Messages,
    PromptInput,
    conversations,
    prompts,
    read_messages,
    read_prompt,
)
from mmserve.offline.runtime import Request, Runtime
from mmserve.offline.submission import Submission
from mmserve.progress import progress_bar
from mmserve.request import Chunk, MediaOptions, Methods, RequestOutput
from mmserve.sampling import SamplingParams

Priority = int | Sequence[int]
MediaIo = Mapping[str, Mapping[str, Any]] | None  # as vLLM's: {"video": {"num_frames": 16}}
Sampling = SamplingParams | Sequence[SamplingParams] | None


class _Offline:
    """A running pipeline, and what `LLM` and `AsyncLLM` ask of it."""

    def __init__(
        self,
        model: str = "tiny",
        *,
        dtype: Dtype = "auto",
        epd: tuple[int, int, int] | None = None,
        kv_memory: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_batched_tokens: int | None = None,
        threads: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        media_io_kwargs: MediaIo = None,
        seed: int | None = None,
        **methods: Unpack[MethodOptions],
    ) -> None:
        """`model` is "tiny", a local Hugging Face directory or a hub name.

        `epd` is the number of encode, prefill and decode processes; None runs every stage on a thread
        of this process. `kv_memory` is bytes of KV pages per language worker. `num_frames` or `fps`
        samples videos; `media_io_kwargs`, here or with a call, says more: {"video": {"num_frames", "fps",
        "start", "end", "max_pixels", "keyframes"}}. `methods` are the command line's: prune, keep,
        keep_image, prune_options, prune_text_images, attention, attention_options,
        attention_dense_below, attention_profile, kv, kv_budget, kv_options, kv_dtype.
        """
        self.methods = choose_methods(MethodDefaults(), **methods)
        given = {"video": {"num_frames": num_frames, "fps": fps}}
        self.options = media_options(given, media_options(media_io_kwargs or {}))
        self._seed = seed
        config = ServeConfig(
            model=str(resolve(model)),
            epd=epd or (1, 1, 1),
            dtype=dtype,
            threads=threads,
            max_num_batched_tokens=max_num_batched_tokens,
            methods=MethodDefaults(kv_dtype=cast(KVDtype, self.methods.kv_dtype)),
            cache=CacheSizes(kv_memory_bytes=kv_memory, gpu_memory_utilization=gpu_memory_utilization),
        )
        self._runtime = Runtime(config, in_process=epd is None)
        # for who forgets to close; at the interpreter's end the runtime closes itself
        weakref.finalize(self, self._runtime.close_elsewhere).atexit = False

    @property
    def chat_format(self) -> ChatFormat:
        return self._runtime.chat_format

    def submit(
        self,
        messages: Messages,
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        methods: Methods | None = None,
        options: MediaOptions | None = None,
        priority: int = 0,
        report_tokens: bool = False,
        report_attention: bool = False,
    ) -> Generation:
        """Start one conversation; `deliver` gets chunks, then one output or error, on another thread.

        With `report_tokens` the output says of every item which of its tokens survive, with
        `report_attention` what sparse attention loses, which costs a dense pass.
        """
        read = partial(read_messages, messages, options=options or self.options)
        request = self._request(read, sampling_params, methods, priority)
        request = replace(request, report_tokens=report_tokens, report_attention=report_attention)
        return self._runtime.submit(request, deliver)

    def worker_pids(self) -> dict[str, int]:
        """Process ids of the workers by name, for monitoring."""
        return self._runtime.pipeline.worker_pids()

    def _chats(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling,
        methods: Methods | None,
        priority: Priority,
        media_io: MediaIo,
    ) -> list[Request]:
        options = media_options(media_io or {}, self.options)
        reads = [partial(read_messages, each, options=options) for each in conversations(messages)]
        return self._requests(reads, sampling, methods, priority)

    def _prompts(
        self,
        given: PromptInput | Sequence[PromptInput],
        sampling: Sampling,
        methods: Methods | None,
        priority: Priority,
        media_io: MediaIo,
    ) -> list[Request]:
        options = media_options(media_io or {}, self.options)
        reads = [partial(read_prompt, each, options=options) for each in prompts(given)]
        return self._requests(reads, sampling, methods, priority)

    def _requests(
        self,
        reads: Sequence[Callable[[ChatFormat], Inputs]],
        sampling: Sampling,
        methods: Methods | None,
        priority: Priority,
    ) -> list[Request]:
        count = len(reads)
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * count
        priorities = [priority] * count if isinstance(priority, int) else list(priority)
        for name, values in (("sampling_params", sampling), ("priority", priorities)):
            if len(values) != count:
                raise BadRequest(f"Expected {name} for {count} requests, but got {len(values)}")
        return [
            self._request(read, params, methods, place)
            for read, params, place in zip(reads, sampling, priorities, strict=True)
        ]

    def _request(
        self,
        read: Callable[[ChatFormat], Inputs],
        sampling: SamplingParams,
        methods: Methods | None,
        priority: int,
    ) -> Request:
        if sampling.seed is None and self._seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=self._seed)
        methods = methods or self.methods
        check_kv_dtype(methods, self.methods.kv_dtype)
        return Request(read=read, sampling=sampling, methods=methods, priority=priority)

    @contextmanager
    def _submitted(
        self,
        requests: Sequence[Request],
        *,
        progress: bool = False,
        on_chunk: Callable[[Chunk], None] = lambda _: None,
    ) -> Iterator[Future[list[RequestOutput]]]:
        """The outputs to come; whatever interrupts who waits for them cancels what still runs."""
        with progress_bar(len(requests), "answering", shown=progress) as advance:
            submission = Submission(self._runtime.submit, requests, on_chunk=on_chunk, on_end=advance)
            try:
                submission.start()
                yield submission.outputs
            except BaseException:
                submission.cancel()
                raise


class LLM(_Offline):
    """A running pipeline that answers while the caller waits. Use it in `with`, or call `close`.

    An interrupt ends what was asked for and leaves the rest usable.
    """

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Sampling = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: Priority = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; raises the first error after all have ended.

        Requests of a lower `priority` come earlier.
        """
        requests = self._chats(messages, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, progress=progress) as outputs:
            return outputs.result()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: Sampling = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: Priority = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue one prompt or a list of them, as they are: no chat template is applied.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}. The last two take
        "multi_modal_data": {"image": one or a list, "video": one or a list}, in the order of the
        model's placeholders in the prompt.
        """
        requests = self._prompts(prompts, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, progress=progress) as outputs:
            return outputs.result()

    def stream(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: int = 0,
    ) -> Generator[Chunk, None, None]:
        """The answer to one conversation as it comes; closing the iterator cancels it."""
        chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        requests = self._chats(messages, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, on_chunk=chunks.put) as outputs:
            outputs.add_done_callback(lambda _: chunks.put(None))
            while (chunk := chunks.get()) is not None:
                yield chunk
            outputs.result()

    def close(self) -> None:
        """Stop the workers and remove everything on disk. Idempotent."""
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncLLM(_Offline):
    """The same for code on an event loop: cancelling a task cancels what it asked for.

    Only the constructor waits, for the model to load. Use it in `async with`, or await `close`.
    """

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Sampling = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: Priority = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        requests = self._chats(messages, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, progress=progress) as outputs:
            return await asyncio.wrap_future(outputs)

    async def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: Sampling = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: Priority = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        requests = self._prompts(prompts, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, progress=progress) as outputs:
            return await asyncio.wrap_future(outputs)

    async def stream(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        methods: Methods | None = None,
        media_io_kwargs: MediaIo = None,
        priority: int = 0,
    ) -> AsyncGenerator[Chunk, None]:
        """As `LLM.stream`; `aclose` the iterator to cancel at once."""
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()

        def put(chunk: Chunk | None) -> None:
            # a loop that was closed has nobody left who reads
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        requests = self._chats(messages, sampling_params, methods, priority, media_io_kwargs)
        with self._submitted(requests, on_chunk=put) as outputs:
            outputs.add_done_callback(lambda _: put(None))
            while (chunk := await chunks.get()) is not None:
                yield chunk
            outputs.result()

    async def close(self) -> None:
        """As `LLM.close`."""
        await asyncio.to_thread(self._runtime.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
