"""Generation: updates of a request become chunks, then exactly one completion or error."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from mmserve import messages as m
from mmserve.errors import MediaError, MMServeError
from mmserve.generation import Generation
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.request import (
    Chunk,
    Completion,
    FinishReason,
    MediaRef,
    MediaReport,
    Prompt,
    Usage,
)
from mmserve.sampling import Logprob, SamplingParams
from mmserve.workers.dispatcher import Dispatcher, Update
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.records import Record, State

CHAT = ChatFormat.from_model_dir(resolve("tiny"))
EOS = CHAT.eos_tokens[0]


class FakePipeline:
    """The real request table without workers: the test says which tokens come."""

    def __init__(self) -> None:
        self.dispatcher = Dispatcher(clock=lambda: 1.0, max_active=9, deadline_s=60)
        self.listeners: dict[str, Callable[[Update], None]] = {}
        self.stopped: list[str] = []
        self.is_delayed = False  # whether a stop is only noted, as while the pipeline's thread is busy

    def admit(self, listener: Callable[[Update], None]) -> str:
        request_id = self.dispatcher.admit()
        self.listeners[request_id] = listener
        return request_id

    def submit(self, request_id: str, prompt: Prompt, fetch_ms: float) -> None:
        self.dispatcher.submit(request_id, prompt, fetch_ms)

    def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)
        if not self.is_delayed:
            self.dispatcher.stop(request_id)

    def cancel(self, request_id: str) -> None:
        self.dispatcher.cancel(request_id)
        self.flush()

    def fail(self, request_id: str, error: MMServeError) -> None:
        self.dispatcher.fail(request_id, error)
        self.flush()

    def record(self, request_id: str) -> Record:
        return self.dispatcher.records[request_id]

    def generate(
        self, request_id: str, *tokens: int, finish: FinishReason | None = None, logprobs: bool = False
    ) -> None:
        """One token after the other, as decode steps report them."""
        for place, token in enumerate(tokens):
            record = self.record(request_id)
            entry = {token: Logprob(-0.5, 1), EOS: Logprob(-2.0, 2)} if logprobs else None
            last = finish if place == len(tokens) - 1 else None
            seq = len(record.tokens)
            sampled = m.Sampled(
                request_id=request_id, attempt=0, seq=seq, token_id=token, logprobs=entry, finish=last
            )
            self.dispatcher._accept(record, sampled)
            self.flush()
            if request_id not in self.dispatcher.records:
                return

    def flush(self) -> None:
        while self.dispatcher.updates:
            update = self.dispatcher.updates.popleft()
            self.listeners[update.request_id](update)


class Client:
    def __init__(self, *, start: bool = True, media: int = 0, **sampling: object) -> None:
        self.pipeline = FakePipeline()
        self.news: list[Chunk | Completion | MMServeError] = []
        self.generation = Generation(cast("Pipeline", self.pipeline), CHAT, self.news.append)
        self.id = self.generation.request_id
        refs = tuple(MediaRef(modality="image", path="/x", digest="d", source="s") for _ in range(media))
        self.prompt = Prompt(
            token_ids=(5, *[CHAT.image_token] * media, 6),
            media=refs,
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]  # named as its fields
        )
        if start:
            self.generation.start(self.prompt, fetch_ms=2.0)

    def generate(self, text: str, finish: FinishReason | None = None, logprobs: bool = False) -> list[int]:
        ids = list(CHAT.tokenizer.encode(text, add_special_tokens=False).ids)
        self.pipeline.generate(self.id, *ids, finish=finish, logprobs=logprobs)
        return ids

    @property
    def chunks(self) -> list[Chunk]:
        return [news for news in self.news if isinstance(news, Chunk)]

    @property
    def completion(self) -> Completion:
        (last,) = [news for news in self.news if not isinstance(news, Chunk)]
        assert last is self.news[-1], "something came after the end"
        assert isinstance(last, Completion)
        return last


def test_chunks_join_to_the_completion() -> None:
    client = Client()
    ids = client.generate("a red square – 日本", FinishReason.LENGTH)
    done = client.completion
    assert done.text == "a red square – 日本" == "".join(chunk.text for chunk in client.chunks)
    assert not any("\ufffd" in chunk.text for chunk in client.chunks)
    assert [token for chunk in client.chunks for token in chunk.token_ids] == ids == list(done.token_ids)
    assert done.finish_reason is FinishReason.LENGTH
    assert done.prompt_token_ids == (5, 6)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, len(ids))
    assert done.request_id == client.id
    assert done.logprobs is None
    assert client.pipeline.stopped == []


def test_an_end_of_sequence_token_counts_but_does_not_show() -> None:
    client = Client()
    client.generate("red")
    client.pipeline.generate(client.id, EOS, finish=FinishReason.STOP)
    assert (client.completion.text, client.completion.finish_reason) == ("red", FinishReason.STOP)
    assert client.completion.token_ids[-1] == EOS


def test_a_stop_string_ends_the_request_and_is_never_shown() -> None:
    client = Client(stop=(" square",))
    client.generate("a red square is blue")
    assert client.pipeline.stopped == [client.id]
    client.pipeline.flush()
    done = client.completion
    assert done.text == "a red" == "".join(chunk.text for chunk in client.chunks)
    assert done.finish_reason is FinishReason.STOP


def test_what_comes_before_the_stop_is_heard_of_is_not_part_of_the_answer() -> None:
    client = Client(stop=(" square",))
    client.pipeline.is_delayed = True
    client.generate("a red square")
    until_stop = len(client.pipeline.record(client.id).tokens)
    client.generate(" is blue")
    client.pipeline.dispatcher.stop(client.id)
    client.pipeline.flush()
    done = client.completion
    assert done.text == "a red"
    assert done.finish_reason is FinishReason.STOP
    assert len(done.token_ids) == until_stop == done.usage.completion_tokens


def test_a_stop_string_with_the_last_allowed_token_is_a_stop() -> None:
    client = Client(stop=(" square",))
    client.generate("a red square", FinishReason.LENGTH)
    assert (client.completion.text, client.completion.finish_reason) == ("a red", FinishReason.STOP)


def test_held_back_text_is_given_out_when_nothing_follows() -> None:
    client = Client(stop=("red squares",))
    client.generate("a red square", FinishReason.LENGTH)
    assert client.completion.text == "a red square"
    assert client.completion.finish_reason is FinishReason.LENGTH


def test_log_probabilities_are_spelled_and_follow_their_tokens() -> None:
    client = Client(logprobs=1)
    ids = client.generate("red blue", FinishReason.LENGTH, logprobs=True)
    done = client.completion
    assert done.logprobs is not None
    assert [set(entry) for entry in done.logprobs] == [{token, EOS} for token in ids]
    for token, entry in zip(ids, done.logprobs, strict=True):
        assert entry[token].decoded_token == CHAT.token_text(token)
        assert entry[EOS].decoded_token == "<|im_end|>"
        assert entry[token].rank == 1
    assert tuple(entry for chunk in client.chunks for entry in chunk.logprobs or ()) == done.logprobs


def test_media_are_reported_and_their_placeholders_expanded() -> None:
    client = Client(media=2)
    record = client.pipeline.record(client.id)
    report = MediaReport(source="s", frames=1, timestamps_s=(0.0,), lost_frames=0, width=4, height=4)
    lease = m.Lease(lease_id="0" * 32, path="/x", total_bytes=1, arrays=(), checksum=0)
    for item, tokens in zip(record.items, (3, 2), strict=True):
        item.encoded, item.report = m.EncodedItem(lease=lease, tokens=tokens, kept=1), report
    client.generate("red", FinishReason.LENGTH)
    done = client.completion
    assert done.prompt_token_ids == (5, *[CHAT.image_token] * 5, 6)
    assert done.media == (report, report)
    assert (done.usage.visual_tokens, done.usage.visual_tokens_kept) == (5, 2)


@pytest.mark.parametrize("media", [0, 2])
@pytest.mark.parametrize("start", [True, False])
def test_a_cancelled_request_says_so_whenever_it_was_cancelled(start: bool, media: int) -> None:
    client = Client(start=start, media=media)
    client.generation.cancel()
    client.generation.cancel()
    done = client.completion
    assert (done.finish_reason, done.text, done.token_ids) == (FinishReason.CANCELLED, "", ())
    assert done.prompt_token_ids == (client.prompt.token_ids if start else ())
    assert done.usage == (Usage(prompt_tokens=2) if start else Usage())


def test_a_request_cancelled_in_the_middle_keeps_its_text() -> None:
    client = Client()
    ids = client.generate("a red")
    client.generation.cancel()
    assert client.completion.text == "a red"
    assert client.completion.finish_reason is FinishReason.CANCELLED
    assert list(client.completion.token_ids) == ids


def test_a_failed_request_delivers_its_error_once() -> None:
    client = Client(start=False)
    error = MediaError("Expected a picture, but got a song")
    client.generation.fail(error)
    client.generation.fail(MediaError("again"))
    client.generation.start(client.prompt)
    assert client.news == [error]
    failing = Client()
    failing.generate("red")
    failing.generation.fail(error)
    assert failing.news[-1] is error
    assert all(isinstance(news, Chunk) for news in failing.news[:-1])


def test_states_that_are_not_the_end_deliver_no_result() -> None:
    client = Client()
    client.generate("red")
    assert client.pipeline.record(client.id).state is not State.FINISHED
    assert all(isinstance(news, Chunk) for news in client.news)
