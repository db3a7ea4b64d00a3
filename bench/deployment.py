"""A running mmserve with a process per stage, as a benchmark asks it.

Knows nothing about what is measured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmserve.bench.requests import question
from mmserve.config import Dtype, ServeConfig
from mmserve.offline.prompts import read_messages
from mmserve.offline.runtime import Request, Runtime
from mmserve.offline.submission import Submission
from mmserve.request import MediaOptions, Methods, RequestOutput
from mmserve.sampling import SamplingParams


class Deployment:
    """One thread per process; one prefill and one decode worker. Use it as a context manager."""

    def __init__(
        self, checkpoint: Path, *, encoders: int = 1, overlap: bool = True, dtype: Dtype = "auto"
    ) -> None:
        config = ServeConfig(
            model=str(checkpoint), epd=(encoders, 1, 1), threads=1, overlap=overlap, dtype=dtype
        )
        self._runtime = Runtime(config, in_process=False)

    def ask(
        self,
        video: dict[str, Any],
        *,
        options: MediaOptions | None = None,
        methods: Methods | None = None,
        tokens: int = 1,
    ) -> RequestOutput:
        """The first question about `video`, a part of a message; the answer is greedy."""
        text = {"type": "text", "text": question(0)}
        messages = [{"role": "user", "content": [{"type": "video", **video}, text]}]
        request = Request(
            read=partial(read_messages, messages, options=options or MediaOptions()),
            sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0),
            methods=methods or Methods(),
        )
        submission = Submission(self._runtime.submit, [request])
        submission.start()
        (output,) = submission.outputs.result()
        return output

    def close(self) -> None:
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
