"""The embedded model with quantized KV: the same answers, in one process and in three."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mmserve.errors import BadRequest
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.sampling import SamplingParams

from .conftest import Conversation, ask

COUNT = 12
SHORT = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def asked(basic_clips: list[tuple[Path, Example]]) -> list[Conversation]:
    return [ask(clip, example.question.text) for clip, example in basic_clips[:COUNT]]


@pytest.fixture(scope="module")
def int8() -> Iterator[LLM]:
    with LLM(kv_dtype="int8", threads=1) as running:
        yield running


def test_int8_answers_as_floats_do(llm: LLM, int8: LLM, asked: list[Conversation]) -> None:
    dense, quantized = llm.chat(asked, SHORT), int8.chat(asked, SHORT)
    same = sum(a.outputs[0].text == b.outputs[0].text for a, b in zip(dense, quantized, strict=True))
    # two answers may be as likely as each other
    assert same >= COUNT - 1
    for one, other in zip(dense, quantized, strict=True):
        assert other.usage.kv_bytes_uncompressed == one.usage.kv_bytes
        # of fp32; the newest page of a short prompt is much of it
        assert 2.5 < one.usage.kv_bytes / other.usage.kv_bytes < 4
        assert other.methods.kv_dtype == "int8"


def test_three_processes_answer_as_one(int8: LLM, asked: list[Conversation]) -> None:
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = int8.chat(asked[:3], long)
    with LLM(kv_dtype="int8", epd=(1, 1, 1), threads=1) as split:
        for found, one in zip(split.chat(asked[:3], long), expected, strict=True):
            assert found.outputs[0].token_ids == one.outputs[0].token_ids
            assert found.usage.kv_bytes == one.usage.kv_bytes


def test_a_conversation_goes_on_from_what_is_cached_in_floats(int8: LLM, asked: list[Conversation]) -> None:
    (first,) = int8.chat([asked[0]], SHORT)
    answer = {"role": "assistant", "content": first.outputs[0].text}
    (second,) = int8.chat([[*asked[0], answer, {"role": "user", "content": "And what else?"}]], SHORT)
    assert second.usage.cached_tokens > first.usage.prompt_tokens - 64


def test_a_request_cannot_choose_another_type(int8: LLM, asked: list[Conversation]) -> None:
    other = msgspec.structs.replace(int8.methods, kv_dtype="int4")
    with pytest.raises(BadRequest, match="kv_dtype int8, since that is how this deployment keeps KV"):
        int8.submit(asked[0], SHORT, deliver=lambda news: None, methods=other)
