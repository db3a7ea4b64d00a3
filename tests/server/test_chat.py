"""Answers through the real OpenAI client and over plain HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mmserve.config import MethodDefaults, PruneUnderLoad, ServeConfig
from mmserve.errors import MediaError
from mmserve.request import MediaOptions
from tests.server.fakes import ANSWER, VIDEO, FakePipeline, RunningServer, ask, events, running_server

REPORT_KEYS = {"finish_reason", "usage", "attention_density", "media", "timings_ms", "methods"}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    shared.pipeline.prompts.clear()
    yield shared
    shared.pipeline.wait_idle()
    shared.pipeline.error = None
    assert shared.fetcher.held == 0


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_client_gets_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What moves?"}]
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_openai_client_gets_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What moves?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_openai_client_gets_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What moves?"}],
        logprobs=True,
        top_logprobs=3,
        max_tokens=2,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 2
    for token in choice.logprobs.content:
        assert token.logprob == -1.5
        assert [each.logprob for each in token.top_logprobs] == [-0.5, -1.5, -9999.0]
        assert bytes(token.bytes or []).decode() == token.token
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content


def test_log_probabilities_without_alternatives(server: RunningServer) -> None:
    (chunk, *_) = [
        each for each in events(ask(server, stream=True, logprobs=True).text)[1:] if each["choices"]
    ]
    (token,) = chunk["choices"][0]["logprobs"]["content"]
    assert token["top_logprobs"] == []
    assert server.pipeline.prompts[0].sampling.logprobs == 0


def test_a_stream_ends_with_done_and_without_usage_unless_asked(server: RunningServer) -> None:
    response = ask(server, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    chunks = events(response.text)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_what_a_request_leaves_open_follows_the_load() -> None:
    load = PruneUnderLoad(floor=0.05, floors={9: 0.02})
    config = ServeConfig(methods=MethodDefaults(prune="holitom"), prune_under_load=load)
    pipeline = FakePipeline()
    asked: list[dict[str, Any]] = [
        {},
        {"mmserve": {"keep": 0.5}},
        {"mmserve": {"prune": "evs"}},
        {"priority": 9},
    ]
    with running_server(config, pipeline=pipeline) as server:
        for pipeline.without_token in (0, 8, 100):
            for fields in asked:
                own = {"report": True, **fields.get("mmserve", {})}
                report = ask(server, **{**fields, "mmserve": own}).json()["usage"]["mmserve"]
                assert report["methods"]["keep"] == pipeline.prompts[-1].methods.keep
        assert "mmserve_keep 0.02" in server.http.get("/metrics").text
    kept = [prompt.methods.keep for prompt in pipeline.prompts]
    assert kept[::4] == [0.25, 0.15, 0.05]
    assert kept[1::4] == [0.5] * 3
    assert kept[2::4] == [0.25] * 3
    assert kept[3::4] == [0.25, 0.14, 0.02]


def test_which_tokens_survive_is_asked_of_the_pipeline() -> None:
    pipeline = FakePipeline()
    with running_server(pipeline=pipeline) as server:
        for own in ({"report": True, "report_tokens": True}, {"report_tokens": True}, {"report": True}):
            assert "mmserve" in ask(server, mmserve=own).json()["usage"], (
                "to ask for tokens is to ask for a report"
            )
    assert [prompt.report_tokens for prompt in pipeline.prompts] == [True, True, False]


def test_the_report_is_there_when_asked_for(server: RunningServer) -> None:
    body = ask(server, messages=VIDEO, mmserve={"report": True, "prune": "holitom", "keep": 0.25}).json()
    report = body["usage"]["mmserve"]
    assert set(report) == REPORT_KEYS
    assert report["usage"]["visual_tokens"] == 20
    assert report["usage"]["visual_tokens_kept"] == 5
    assert report["methods"] == {
        "prune": "holitom",
        "keep": 0.25,
        "keep_image": None,
        "prune_options": {},
        "prune_text_images": False,
        "attention": "dense",
        "attention_options": {},
        "attention_dense_below": None,
        "attention_profile": None,
        "kv": "none",
        "kv_budget": None,
        "kv_options": {},
        "kv_dtype": "auto",
    }
    assert report["attention_density"] == report["usage"]["attention_density"] == [1.0, 0.5]
    assert report["media"][0]["timestamps_s"] == [0.0, 1.0]
    times = report["timings_ms"]
    parts = [times[name] for name in list(times) if name not in ("ttft", "generate", "total")]
    assert sum(parts) == pytest.approx(times["ttft"], abs=1.0)
    assert "mmserve" not in ask(server).json()["usage"]


def test_the_report_of_a_stream_is_in_its_usage_chunk(server: RunningServer) -> None:
    *_, last = events(ask(server, stream=True, mmserve={"report": True}).text)
    assert last["choices"] == []
    assert set(last["usage"]["mmserve"]) == REPORT_KEYS


def test_parameters_reach_the_pipeline(server: RunningServer) -> None:
    ask(
        server,
        messages=VIDEO,
        max_completion_tokens=7,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=11,
        stop="zzz",
        logprobs=True,
        top_logprobs=2,
        mmserve={"kv": "snapkv", "kv_budget": 0.5, "attention": "dense"},
        media_io_kwargs={"video": {"num_frames": 5}},
        user="somebody",
        metadata={"a": "b"},
        n=1,
        tools=[],
        response_format={"type": "text"},
    ).raise_for_status()
    (prompt,) = server.pipeline.prompts
    sampling = prompt.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 3)
    assert (sampling.seed, sampling.stop, sampling.logprobs) == (11, ("zzz",), 2)
    assert (prompt.methods.kv, prompt.methods.kv_budget) == ("snapkv", 0.5)
    assert prompt.media[0].options.num_frames == 5
    assert prompt.salt == ""


def test_our_sampling_options_win_over_those_of_vllm(server: RunningServer) -> None:
    ask(server, messages=VIDEO, mmserve={"fps": 2}, media_io_kwargs={"video": {"num_frames": 5}})
    assert server.pipeline.prompts[0].media[0].options.fps == 2.0
    assert server.pipeline.prompts[0].media[0].options.num_frames is None


def test_a_part_of_a_video_may_be_asked_about(server: RunningServer) -> None:
    asked = {"start": 1.5, "end": 4, "max_pixels": 1000, "keyframes": True}
    ask(server, messages=VIDEO, media_io_kwargs={"video": asked})
    options = MediaOptions(start_s=1.5, end_s=4.0, max_pixels=1000, keyframes_only=True)
    assert server.pipeline.prompts[0].media[0].options == options


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_before_it(server: RunningServer, stream: bool) -> None:
    response = ask(server, stream=stream, stop=["then"])
    if stream:
        chunks = events(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert text == ANSWER[: ANSWER.index("then")]
    assert finish == "stop"


def test_a_priority_reaches_the_pipeline(server: RunningServer) -> None:
    ask(server)
    ask(server, priority=3)
    assert [prompt.priority for prompt in server.pipeline.prompts] == [0, 3]


def test_a_salt_separates_caches(server: RunningServer) -> None:
    for salt in ("a", "b", "a"):
        ask(server, cache_salt=salt)
    first, second, third = (prompt.salt for prompt in server.pipeline.prompts)
    assert first == third != second
    assert "" not in (first, second)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_own_status(server: RunningServer, stream: bool) -> None:
    server.pipeline.error = MediaError("Expected a video, but got something else")
    response = ask(server, messages=VIDEO, stream=stream)
    assert response.status_code == 422
    assert response.json()["error"] == {
        "message": "Expected a video, but got something else",
        "type": "invalid_request_error",
        "param": None,
        "code": "media_error",
    }


def test_an_error_after_the_first_token_ends_the_stream(server: RunningServer) -> None:
    server.pipeline.gate.clear()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "What moves?"}], stream=True
        )
        next(iter(stream))
        (request_id,) = server.pipeline.records
        server.pipeline.fail(request_id, MediaError("The video broke off"))
        server.pipeline.gate.set()
        with pytest.raises(openai.APIError, match="The video broke off"):
            list(stream)


def test_requests_answer_side_by_side(server: RunningServer) -> None:
    server.pipeline.gate.clear()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        streams = [
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "What moves?"}], stream=True
            )
            for _ in range(3)
        ]
        server.pipeline.gate.set()
        for stream in streams:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER


# several answers


def test_several_answers_are_choices_of_one_response(server: RunningServer) -> None:
    body = ask(server, messages=VIDEO, n=3, temperature=0.5, seed=4, mmserve={"report": True}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == [ANSWER] * 3
    assert sorted(prompt.sampling.seed or 0 for prompt in server.pipeline.prompts) == [4, 5, 6]
    one = ask(server, messages=VIDEO, temperature=0.5).json()["usage"]
    assert body["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    assert set(body["usage"]["mmserve"]) == REPORT_KEYS


def test_several_answers_stream_beside_each_other(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What moves?"}],
        n=3,
        temperature=0.5,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(3):
        mine = [choice for choice in choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == ANSWER
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert mine[-1].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_greedy_answers_are_refused(server: RunningServer) -> None:
    response = ask(server, n=2)
    assert response.status_code == 400
    assert "Expected n of 1 with temperature 0" in response.json()["error"]["message"]
    assert server.pipeline.prompts == []


def test_several_answers_need_room_for_all(server: RunningServer) -> None:
    for _ in range(60):
        server.pipeline.admit(lambda _: None)
    assert ask(server, n=5, temperature=0.5).status_code == 429
    assert len(server.pipeline.records) == 60
    assert ask(server, n=4, temperature=0.5).status_code == 200
    server.pipeline.records.clear()


def test_a_stop_text_is_kept_where_it_is_wanted(server: RunningServer) -> None:
    body = ask(server, stop=["then"], include_stop_str_in_output=True).json()
    assert body["choices"][0]["message"]["content"] == ANSWER[: ANSWER.index("then") + 4]
