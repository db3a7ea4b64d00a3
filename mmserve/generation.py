"""One running request as a front door sees it: updates in, text chunks and the final result out.

Shared by the API, the batch runner and `LLM`. Knows nothing about HTTP or models.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mmserve import messages as m
from mmserve.errors import MMServeError
from mmserve.models.chat import ChatFormat, Detokenizer
from mmserve.models.layout import expand_tokens
from mmserve.request import Chunk, Completion, FinishReason, Prompt, Usage
from mmserve.sampling import Logprob
from mmserve.workers.dispatcher import Update
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.records import Record, State

Deliver = Callable[[Chunk | Completion | MMServeError], None]


class Generation:
    """Starts a request and turns its updates into chunks, a completion, or an error.

    `deliver` is called on the pipeline's thread: any number of chunks, then exactly one completion
    or error.
    """

    def __init__(self, pipeline: Pipeline, chat: ChatFormat, deliver: Deliver) -> None:
        self._pipeline = pipeline
        self._chat = chat
        self._deliver = deliver
        self._detokenizer = Detokenizer(chat)
        self._text = ""
        self._num_tokens = 0
        self.request_id = pipeline.admit(self._on_update)

    def start(self, prompt: Prompt, fetch_ms: float = 0.0) -> None:
        self._detokenizer = Detokenizer(self._chat, prompt.sampling.stop)
        self._pipeline.submit(self.request_id, prompt, fetch_ms)

    def fail(self, error: MMServeError) -> None:
        """The request cannot even start (its media could not be fetched, say)."""
        self._pipeline.fail(self.request_id, error)

    def cancel(self) -> None:
        self._pipeline.cancel(self.request_id)

    def _on_update(self, update: Update) -> None:
        # what was generated after the stop string, until the workers heard of it, is not part of the answer
        kept = () if self._detokenizer.stopped else update.tokens
        sampled = [self._spelled(token) for token in kept]
        self._num_tokens += len(sampled)
        text = (
            "" if self._detokenizer.stopped else self._detokenizer.add([token.token_id for token in sampled])
        )
        if update.is_final and not self._detokenizer.stopped:
            text += self._detokenizer.flush()
        self._text += text
        if sampled:
            logprobs = tuple(t.logprobs for t in sampled if t.logprobs is not None) or None
            self._deliver(Chunk(text=text, token_ids=tuple(t.token_id for t in sampled), logprobs=logprobs))
        if update.is_final:
            self._deliver(self._result(update.record))
        elif self._detokenizer.stopped:
            self._pipeline.stop(update.request_id)

    def _result(self, record: Record) -> Completion | MMServeError:
        if record.state is State.FAILED:
            assert record.error is not None
            return record.error
        prompt = record.prompt
        if prompt is None or not all(item.encoded for item in record.items):
            # cancelled before its prompt was known in full
            prompt = prompt or Prompt(token_ids=())
            counts = []
        else:
            counts = [item.encoded.tokens for item in record.items if item.encoded]
        tokens = record.tokens[: self._num_tokens]
        logprobs = tuple(t.logprobs for t in map(self._spelled, tokens) if t.logprobs is not None)
        usage = record.usage() if record.prompt else Usage()
        return Completion(
            request_id=record.request_id,
            text=self._text,
            token_ids=tuple(token.token_id for token in tokens),
            finish_reason=self._finish_reason(record),
            prompt_token_ids=expand_tokens(
                prompt.token_ids, counts, (self._chat.image_token, self._chat.video_token)
            )
            if counts or not prompt.media
            else prompt.token_ids,
            usage=msgspec.structs.replace(usage, completion_tokens=len(tokens)),
            timings_ms=record.timings(),
            media=tuple(item.report for item in record.items if item.report),
            methods=prompt.methods,
            logprobs=logprobs or None,
        )

    def _finish_reason(self, record: Record) -> FinishReason:
        if record.state is State.FINISHED and self._detokenizer.stopped:
            return FinishReason.STOP  # also when the stop string came with the last allowed token
        return record.finish or FinishReason.CANCELLED

    def _spelled(self, token: m.Sampled) -> m.Sampled:
        """The token with the text of every reported candidate."""
        if token.logprobs is None:
            return token
        spelled: dict[int, Logprob] = {
            index: msgspec.structs.replace(entry, decoded_token=self._chat.token_text(index))
            for index, entry in token.logprobs.items()
        }
        return msgspec.structs.replace(token, logprobs=spelled)
