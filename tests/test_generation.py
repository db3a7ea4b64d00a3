"""Generation: updates of its requests become chunks, then exactly one output or error."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from mmserve import messages as m
from mmserve.errors import MediaError, MMServeError, Overloaded, Unavailable
from mmserve.generation import Generation
from mmserve.models.chat import ChatFormat
from mmserve.models.resolve import resolve
from mmserve.request import (
    Chunk,
    CompletionOutput,
    FinishReason,
    MediaRef,
    MediaReport,
    Prompt,
    RequestOutput,
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
        self.admitted: list[str] = []
        self.stopped: list[str] = []
        self.is_delayed = False  # whether a stop is only noted, as while the pipeline's thread is busy

    def admit(self, listener: Callable[[Update], None]) -> str:
        request_id = self.dispatcher.admit()
        self.listeners[request_id] = listener
        self.admitted.append(request_id)
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
        self.news: list[Chunk | RequestOutput | MMServeError] = []
        params = SamplingParams(**sampling)  # type: ignore[arg-type]  # named as its fields
        self.generation = Generation(cast("Pipeline", self.pipeline), CHAT, params, self.news.append)
        self.id = self.generation.request_id
        refs = tuple(MediaRef(modality="image", path="/x", digest="d", source="s") for _ in range(media))
        self.prompt = Prompt(
            token_ids=(5, *[CHAT.image_token] * media, 6),
            media=refs,
            sampling=params,
        )
        if start:
            self.generation.start(self.prompt, fetch_ms=2.0)

    def generate(
        self, text: str, finish: FinishReason | None = None, logprobs: bool = False, index: int = 0
    ) -> list[int]:
        ids = list(CHAT.tokenizer.encode(text, add_special_tokens=False).ids)
        self.pipeline.generate(self.pipeline.admitted[index], *ids, finish=finish, logprobs=logprobs)
        return ids

    @property
    def chunks(self) -> list[Chunk]:
        return [news for news in self.news if isinstance(news, Chunk)]

    @property
    def output(self) -> RequestOutput:
        (last,) = [news for news in self.news if not isinstance(news, Chunk)]
        assert last is self.news[-1], "something came after the end"
        assert isinstance(last, RequestOutput)
        return last

    @property
    def answer(self) -> CompletionOutput:
        (answer,) = self.output.outputs
        return answer


def test_chunks_join_to_the_answer() -> None:
    client = Client()
    ids = client.generate("a red square – 日本", FinishReason.LENGTH)
    done, answer = client.output, client.answer
    assert answer.text == "a red square – 日本" == "".join(chunk.text for chunk in client.chunks)
    assert not any("\ufffd" in chunk.text for chunk in client.chunks)
    assert [token for chunk in client.chunks for token in chunk.token_ids] == ids == list(answer.token_ids)
    assert answer.finish_reason is FinishReason.LENGTH
    assert [chunk.finish_reason for chunk in client.chunks] == [None] * (len(ids) - 1) + [FinishReason.LENGTH]
    assert done.prompt_token_ids == (5, 6)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, len(ids))
    assert done.request_id == client.id
    assert answer.logprobs is None
    assert client.pipeline.stopped == []


def test_an_end_of_sequence_token_counts_but_does_not_show() -> None:
    client = Client()
    client.generate("red")
    client.pipeline.generate(client.id, EOS, finish=FinishReason.STOP)
    assert (client.answer.text, client.answer.finish_reason) == ("red", FinishReason.STOP)
    assert client.answer.token_ids[-1] == EOS


@pytest.mark.parametrize("keeps", [False, True])
def test_a_token_that_stopped_the_answer_shows_only_if_it_is_wanted(keeps: bool) -> None:
    client = Client(stop_token_ids=(9,), include_stop_str_in_output=keeps, stop=("red squares",))
    ids = client.generate("a red square", FinishReason.STOP)
    assert client.answer.text == ("a red square" if keeps else CHAT.decode(ids[:-1]))
    assert client.answer.text == "".join(chunk.text for chunk in client.chunks)
    assert list(client.answer.token_ids) == ids
    assert client.answer.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("keeps", "text"), [(False, "a red"), (True, "a red square")])
def test_a_stop_string_ends_the_request_and_shows_only_if_it_is_wanted(keeps: bool, text: str) -> None:
    client = Client(stop=(" square", "square is"), include_stop_str_in_output=keeps)
    client.generate("a red square is blue")
    assert client.pipeline.stopped == [client.id]
    client.pipeline.flush()
    assert client.answer.text == text == "".join(chunk.text for chunk in client.chunks)
    assert client.answer.finish_reason is FinishReason.STOP
    assert client.chunks[-1].finish_reason is FinishReason.STOP


def test_a_stop_string_among_the_first_tokens_is_text() -> None:
    ids = CHAT.tokenizer.encode("a red square", add_special_tokens=False).ids
    client = Client(stop=(" square",), min_tokens=len(ids))
    client.generate("a red square is a blue square")
    client.pipeline.flush()
    assert client.answer.text == "a red square is a blue"


def test_what_comes_before_the_stop_is_heard_of_is_not_part_of_the_answer() -> None:
    client = Client(stop=(" square",))
    client.pipeline.is_delayed = True
    client.generate("a red square")
    until_stop = len(client.pipeline.record(client.id).tokens)
    client.generate(" is blue")
    client.pipeline.dispatcher.stop(client.id)
    client.pipeline.flush()
    answer = client.answer
    assert answer.text == "a red"
    assert answer.finish_reason is FinishReason.STOP
    assert len(answer.token_ids) == until_stop == client.output.usage.completion_tokens


def test_a_stop_string_with_the_last_allowed_token_is_a_stop() -> None:
    client = Client(stop=(" square",))
    client.generate("a red square", FinishReason.LENGTH)
    assert (client.answer.text, client.answer.finish_reason) == ("a red", FinishReason.STOP)


def test_held_back_text_is_given_out_when_nothing_follows() -> None:
    client = Client(stop=("red squares",))
    client.generate("a red square", FinishReason.LENGTH)
    assert client.answer.text == "a red square"
    assert client.answer.finish_reason is FinishReason.LENGTH


def test_log_probabilities_are_spelled_and_follow_their_tokens() -> None:
    client = Client(logprobs=1)
    ids = client.generate("red blue", FinishReason.LENGTH, logprobs=True)
    done = client.answer
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
        times = m.EncodeTimes(queue=0, decode=0, preprocess=0, encode=0, prune=0, publish=0)
        item.parts = [m.EncodedPart(lease=lease, tokens=tokens, kept=1)]
        item.whole = m.EncodedMedia(cached_tokens=0, report=report, times=times)
    client.generate("red", FinishReason.LENGTH)
    done = client.output
    assert done.prompt_token_ids == (5, *[CHAT.image_token] * 5, 6)
    assert done.media == (report, report)
    assert (done.usage.visual_tokens, done.usage.visual_tokens_kept) == (5, 2)


@pytest.mark.parametrize("media", [0, 2])
@pytest.mark.parametrize("start", [True, False])
def test_a_cancelled_request_says_so_whenever_it_was_cancelled(start: bool, media: int) -> None:
    client = Client(start=start, media=media)
    client.generation.cancel()
    client.generation.cancel()
    done, answer = client.output, client.answer
    assert (answer.finish_reason, answer.text, answer.token_ids) == (FinishReason.CANCELLED, "", ())
    assert client.chunks == []
    assert done.prompt_token_ids == (client.prompt.token_ids if start else ())
    assert done.usage == (Usage(prompt_tokens=2) if start else Usage())


def test_a_request_cancelled_in_the_middle_keeps_its_text() -> None:
    client = Client()
    ids = client.generate("a red")
    client.generation.cancel()
    assert client.answer.text == "a red"
    assert client.answer.finish_reason is FinishReason.CANCELLED
    assert list(client.answer.token_ids) == ids
    assert not any(chunk.finish_reason for chunk in client.chunks)


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


# several answers


def test_each_answer_has_its_own_text_tokens_and_end() -> None:
    client = Client(n=3, temperature=1.0)
    client.generate("red", FinishReason.LENGTH, index=1)
    client.generate("blue squ", index=0)
    client.generate("left", FinishReason.STOP, index=2)
    assert not any(isinstance(news, RequestOutput) for news in client.news)
    client.generate("are", FinishReason.LENGTH, index=0)
    outputs = client.output.outputs
    assert [each.index for each in outputs] == [0, 1, 2]
    assert [each.text for each in outputs[:2]] == ["blue square", "red"]
    assert [each.finish_reason for each in outputs] == ["length", "length", "stop"]
    for each in outputs:
        chunks = [chunk for chunk in client.chunks if chunk.index == each.index]
        assert "".join(chunk.text for chunk in chunks) == each.text
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [each.finish_reason]
    assert client.output.usage.prompt_tokens == 2
    assert client.output.usage.completion_tokens == sum(len(each.token_ids) for each in outputs)
    assert client.output.request_id == client.pipeline.admitted[0]


@pytest.mark.parametrize("seed", [None, 11, 2**63 - 1])
def test_answers_draw_from_seeds_of_their_own(seed: int | None) -> None:
    client = Client(n=3, temperature=1.0, seed=seed, prompt_logprobs=2)
    prompts = [client.pipeline.record(each).prompt for each in client.pipeline.admitted]
    sampling = [prompt.sampling for prompt in prompts if prompt is not None]
    assert [each.n for each in sampling] == [1, 1, 1]
    assert len({each.seed for each in sampling}) == 3
    if seed is not None:
        assert [each.seed for each in sampling] == [(seed + index) % 2**63 for index in range(3)]
    # one report on the prompt is enough, and the others may take it from the cache
    assert [each.prompt_logprobs for each in sampling] == [2, None, None]


def test_a_stop_string_ends_its_own_answer_only() -> None:
    client = Client(n=2, temperature=1.0, stop=(" square",))
    client.generate("a red square", index=1)
    client.pipeline.flush()
    assert client.pipeline.stopped == [client.pipeline.admitted[1]]
    client.generate("a blue", FinishReason.LENGTH, index=0)
    assert [each.text for each in client.output.outputs] == ["a blue", "a red"]


def test_the_first_answer_that_fails_ends_all() -> None:
    client = Client(n=3, temperature=1.0)
    client.generate("red", FinishReason.LENGTH, index=0)
    error = MediaError("Expected a picture, but got a song")
    client.pipeline.fail(client.pipeline.admitted[1], error)
    assert client.news[-1] is error
    assert sum(isinstance(news, MMServeError) for news in client.news) == 1
    assert client.pipeline.dispatcher.records == {}


def test_cancelling_ends_all_answers() -> None:
    client = Client(n=2, temperature=1.0)
    client.generate("red", FinishReason.LENGTH, index=1)
    client.generation.cancel()
    assert [each.finish_reason for each in client.output.outputs] == ["cancelled", "length"]
    failing = Client(n=2, temperature=1.0, start=False)
    failing.generation.fail(MediaError("Expected a picture"))
    assert len(failing.news) == 1
    assert failing.pipeline.dispatcher.records == {}


def test_all_answers_are_admitted_or_none() -> None:
    pipeline = FakePipeline()
    news: list[object] = []
    params = SamplingParams(n=9, temperature=1.0)
    Generation(cast("Pipeline", pipeline), CHAT, SamplingParams(), news.append)
    with pytest.raises(Overloaded):
        Generation(cast("Pipeline", pipeline), CHAT, params, news.append)
    assert len(pipeline.dispatcher.records) == 1
    assert news == []


def test_an_answer_that_fails_while_the_others_are_admitted_is_told_once() -> None:
    pipeline = FakePipeline()
    news: list[object] = []
    error = Unavailable("The server is shutting down")

    def admit(listener: Callable[[Update], None]) -> str:
        if pipeline.admitted:
            pipeline.fail(pipeline.admitted[0], error)
            raise error
        return FakePipeline.admit(pipeline, listener)

    pipeline.admit = admit  # type: ignore[method-assign]
    generation = Generation(
        cast("Pipeline", pipeline), CHAT, SamplingParams(n=2, temperature=1.0), news.append
    )
    generation.start(Prompt(token_ids=(5,)))
    assert news == [error]


def test_log_probabilities_of_the_prompt_are_spelled() -> None:
    client = Client(prompt_logprobs=1)
    found = (None, {EOS: Logprob(-0.5, 1)})
    client.pipeline.record(client.id).prefilled = m.PromptPrefilled(
        request_id=client.id,
        attempt=0,
        first=None,
        lease=None,
        prompt_logprobs=found,
        next_order=2,
        next_position=2,
        slots=2,
        kv_bytes=2,
        kv_bytes_uncompressed=2,
        queue_ms=2.0,
        transfer_ms=2.0,
        prefill_ms=2.0,
    )
    client.generate("red", FinishReason.LENGTH)
    first, second = client.output.prompt_logprobs or ()
    assert first is None
    assert second is not None
    assert {index: entry.decoded_token for index, entry in second.items()} == {EOS: "<|im_end|>"}
    without = Client()
    without.generate("red", FinishReason.LENGTH)
    assert without.output.prompt_logprobs is None
