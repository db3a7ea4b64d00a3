"""One prompt being answered as a front door sees it: updates in, text chunks and the final result out.

Here alone `n` answers become `n` requests. Shared by the API, the batch runner, `LLM` and `AsyncLLM`.
Knows nothing about HTTP or models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from mmserve import messages as m
from mmserve.errors import MMServeError
from mmserve.models.chat import ChatFormat, Detokenizer
from mmserve.models.layout import expand
from mmserve.request import Chunk, CompletionOutput, FinishReason, Prompt, RequestOutput, Timings, Usage
from mmserve.sampling import Logprob, SamplingParams
from mmserve.workers.dispatcher import Update
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.records import Record, State
from mmserve.workers.survivors import media_reports

Deliver = Callable[[Chunk | RequestOutput | MMServeError], None]


class Generation:
    """Starts the requests for one prompt and turns their updates into chunks, an output, or an error.

    `deliver` is called on the pipeline's thread: any number of chunks, then exactly one output or error.
    The first answer that fails ends the others. Raises Overloaded unless there is room for all.
    """

    def __init__(
        self, pipeline: Pipeline, chat: ChatFormat, sampling: SamplingParams, deliver: Deliver
    ) -> None:
        self._pipeline = pipeline
        self._chat = chat
        self._deliver = deliver
        self._lock = threading.Lock()
        self._has_ended = False
        self._answers: list[_Answer] = []
        for index in range(sampling.n):
            answer = _Answer(index, _of_answer(sampling, index), chat)
            try:
                answer.request_id = pipeline.admit(partial(self._on_update, answer))
            except MMServeError:
                if self.drop():
                    raise
                break  # an answer admitted before has failed meanwhile, and that was delivered
            self._answers.append(answer)
        self.request_id = self._answers[0].request_id

    def start(self, prompt: Prompt, fetch_ms: float = 0.0) -> None:
        """The sampling parameters are those given before; the prompt's own are not looked at."""
        for answer in self._answers:
            own = msgspec.structs.replace(prompt, sampling=answer.sampling)
            self._pipeline.submit(answer.request_id, own, fetch_ms)

    def fail(self, error: MMServeError) -> None:
        """The request cannot even start (its media could not be fetched, say)."""
        self._pipeline.fail(self.request_id, error)

    def cancel(self) -> None:
        for answer in self._answers:
            self._pipeline.cancel(answer.request_id)

    def drop(self) -> bool:
        """End it without a word, because its starter is told why; False if its end was delivered already."""
        is_open = self._end()
        self.cancel()
        return is_open

    def _on_update(self, answer: _Answer, update: Update) -> None:
        if self._has_ended:
            return
        record = update.record
        if record.state is State.FAILED:
            assert record.error is not None
            if self._end():
                self._deliver(record.error)
                self.cancel()
            return
        if (chunk := answer.take(update)) is not None:
            self._deliver(chunk)
        if update.is_final:
            if all(each.record is not None for each in self._answers) and self._end():
                self._deliver(self._output())
        elif answer.is_stopped:
            self._pipeline.stop(update.request_id)

    def _end(self) -> bool:
        """Whether it had not ended before."""
        with self._lock:
            is_first, self._has_ended = not self._has_ended, True
            return is_first

    def _output(self) -> RequestOutput:
        records = [answer.record for answer in self._answers if answer.record is not None]
        record = records[0]
        prompt = record.prompt or Prompt(token_ids=())
        outputs = tuple(answer.output() for answer in self._answers)
        completion_tokens = sum(len(output.token_ids) for output in outputs)
        usage = record.usage() if record.prompt else Usage()
        return RequestOutput(
            request_id=self.request_id,
            outputs=outputs,
            prompt_token_ids=self._expanded(record, prompt),
            usage=msgspec.structs.replace(usage, completion_tokens=completion_tokens),
            timings_ms=_together([record.timings() for record in records]),
            media=media_reports(record, (self._chat.image_token, self._chat.video_token)),
            methods=prompt.methods,
            attention=record.prefilled.attention if record.prefilled else None,
            prompt_logprobs=_spelled_prompt(record.prompt_logprobs, self._chat),
        )

    def _expanded(self, record: Record, prompt: Prompt) -> tuple[int, ...]:
        if not all(item.is_whole for item in record.items):
            return prompt.token_ids  # cancelled before its prompt was known in full
        counts = [item.tokens for item in record.items]
        media_tokens = (self._chat.image_token, self._chat.video_token)
        return tuple(expand(prompt.token_ids, counts, media_tokens).tolist())


class _Answer:
    """One of the answers: its text so far and, once it has ended, its record."""

    def __init__(self, index: int, sampling: SamplingParams, chat: ChatFormat) -> None:
        self.index = index
        self.sampling = sampling
        self.request_id = ""
        self.record: Record | None = None
        self._chat = chat
        self._keeps_stop = sampling.include_stop_str_in_output
        self._detokenizer = Detokenizer(
            chat, sampling.stop, keeps_stop=self._keeps_stop, min_tokens=sampling.min_tokens
        )
        self._text = ""
        self._num_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: what is generated until the workers hear of it is not part of it."""
        return self._detokenizer.stopped

    def take(self, update: Update) -> Chunk | None:
        """What is new to a reader."""
        sampled = [] if self.is_stopped else [self._spelled(token) for token in update.tokens]
        self._num_tokens += len(sampled)
        text = self._detokenizer.add([token.token_id for token in sampled if self._shows(token)])
        finish = None
        if update.is_final:
            text += self._detokenizer.flush()
            self.record = update.record
            finish = self._finish_reason(update.record)
        self._text += text
        if finish is FinishReason.CANCELLED:
            finish = None
        if not (sampled or text or finish):
            return None
        return Chunk(
            text=text,
            token_ids=tuple(token.token_id for token in sampled),
            logprobs=tuple(token.logprobs for token in sampled if token.logprobs is not None) or None,
            index=self.index,
            finish_reason=finish,
        )

    def output(self) -> CompletionOutput:
        assert self.record is not None, "only an answer that has ended is put out"
        tokens = self.record.tokens[: self._num_tokens]
        logprobs = tuple(t.logprobs for t in map(self._spelled, tokens) if t.logprobs is not None)
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=tuple(token.token_id for token in tokens),
            finish_reason=self._finish_reason(self.record),
            logprobs=logprobs or None,
        )

    def _finish_reason(self, record: Record) -> FinishReason:
        if record.state is State.FINISHED and self.is_stopped:
            return FinishReason.STOP  # also when the stop string came with the last allowed token
        return record.finish or FinishReason.CANCELLED

    def _shows(self, token: m.Sampled) -> bool:
        """Whether the token is part of the text: one that stopped the answer is not, unless asked for."""
        return token.finish is not FinishReason.STOP or self._keeps_stop

    def _spelled(self, token: m.Sampled) -> m.Sampled:
        if token.logprobs is None:
            return token
        return msgspec.structs.replace(token, logprobs=_spelled(token.logprobs, self._chat))


def _of_answer(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one answer: seeds count up from the given one; the prompt is reported on once."""
    seed = None if sampling.seed is None else (sampling.seed + index) % 2**63
    prompt_logprobs = sampling.prompt_logprobs if index == 0 else None
    return msgspec.structs.replace(sampling, n=1, seed=seed, prompt_logprobs=prompt_logprobs)


def _together(timings: Sequence[Timings]) -> Timings:
    """The times of the answer that began first, until the end of the last."""
    first = min(timings, key=lambda each: each.ttft)
    total = max(each.total for each in timings)
    return msgspec.structs.replace(first, total=total, generate=total - first.ttft)


def _spelled(candidates: Mapping[int, Logprob], chat: ChatFormat) -> dict[int, Logprob]:
    """With the text of every reported candidate."""
    return {
        index: msgspec.structs.replace(entry, decoded_token=chat.token_text(index))
        for index, entry in candidates.items()
    }


def _spelled_prompt(
    found: Sequence[Mapping[int, Logprob] | None] | None, chat: ChatFormat
) -> tuple[dict[int, Logprob] | None, ...] | None:
    if found is None:
        return None
    return tuple(None if candidates is None else _spelled(candidates, chat) for candidates in found)
