"""mmserve's side of a benchmark: `LLM` with every stage in this process, as a user would call it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from mmserve.bench.requests import Ask, messages, video
from mmserve.bench.side import Job, Outcome, SideConfig
from mmserve.llm import LLM
from mmserve.media.preprocess import Preprocessing
from mmserve.sampling import SamplingParams

CANDIDATES = 20  # first tokens whose log-probabilities are compared


class OurSide:
    def __init__(self, config: SideConfig) -> None:
        self._frame_side = Preprocessing.from_model_dir(Path(config.checkpoint)).video.side
        self._llm = LLM(
            config.checkpoint,
            dtype=config.dtype,
            threads=config.threads,
            kv_memory=config.kv_memory,
            **msgspec.to_builtins(config.methods),
        )

    def run(self, job: Job) -> Outcome:
        conversations = self._conversations(job.asks)
        sampling = SamplingParams(temperature=0, max_tokens=job.tokens, ignore_eos=True)
        if job.kind == "score":
            return self._score(conversations[0], job)
        if job.kind == "decode":
            return self._decode(conversations, sampling)
        started_at = time.perf_counter()
        if job.kind == "together":
            answers = self._llm.chat(conversations, sampling)
        else:
            answers = [self._llm.chat(conversation, sampling)[0] for conversation in conversations]
        seconds = time.perf_counter() - started_at
        return Outcome(seconds=seconds, prune_ms=sum(answer.timings_ms.prune for answer in answers))

    def _conversations(self, asks: Sequence[Ask]) -> list[list[Mapping[str, Any]]]:
        videos = {(ask.video, ask.frames): video(ask.video, ask.frames, self._frame_side) for ask in asks}
        return [messages(ask, videos[ask.video, ask.frames]) for ask in asks]

    def _decode(self, conversations: list[list[Mapping[str, Any]]], sampling: SamplingParams) -> Outcome:
        """The second time, every prompt is in the prefix cache, so that all requests decode together."""
        if len(conversations) > 1:
            self._llm.chat(conversations, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        answers = self._llm.chat(conversations, sampling)
        step_ms = median(answer.timings_ms.generate for answer in answers) / (sampling.max_tokens - 1)
        usage = answers[0].usage
        return Outcome(
            seconds=step_ms / 1e3,
            prompt_tokens=usage.prompt_tokens,
            kv_bytes=usage.kv_bytes,
            kv_bytes_dense=usage.kv_bytes_dense,
        )

    def _score(self, conversation: list[Mapping[str, Any]], job: Job) -> Outcome:
        (answer,) = self._llm.chat(
            conversation,
            SamplingParams(
                temperature=0,
                max_tokens=job.tokens,
                ignore_eos=True,
                logprobs=CANDIDATES,
                prompt_logprobs=0 if job.prompt_logprobs else None,
            ),
        )
        (output,) = answer.outputs
        assert output.logprobs is not None
        prompt = zip(answer.prompt_token_ids, answer.prompt_logprobs or (), strict=False)
        return Outcome(
            token_ids=output.token_ids,
            candidates={token: entry.logprob for token, entry in output.logprobs[0].items()},
            prompt_logprobs=tuple(entry[token].logprob for token, entry in prompt if entry is not None),
        )

    def close(self) -> None:
        self._llm.close()
