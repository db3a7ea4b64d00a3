"""Sampling fields of a chat request, as OpenAI's and vLLM's clients send them, become SamplingParams."""

from __future__ import annotations

from typing import Any

import pytest

from mmserve.config import Limits
from mmserve.errors import BadRequest
from mmserve.sampling import SamplingParams
from mmserve.server.errors import FieldError
from mmserve.server.schema import DEFAULT_MAX_TOKENS, ChatRequest, parse_body, sampling_of


def sampling(**fields: object) -> SamplingParams:
    return sampling_of(parse_body(ChatRequest, {"messages": [], **fields}), Limits())


SAME_NAME: dict[str, Any] = {
    "n": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": -0.5,
    "frequency_penalty": 2,
    "seed": 11,
    "min_tokens": 4,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
}


def test_fields_of_the_same_name_are_passed_on() -> None:
    assert sampling(**SAME_NAME, max_tokens=9) == SamplingParams(**SAME_NAME, max_tokens=9)


def test_token_ids_are_read_from_json() -> None:
    params = sampling(stop_token_ids=[5, 6], logit_bias={"50256": -100, "7": 0.5}, top_k=-1)
    assert params.stop_token_ids == (5, 6)
    assert params.logit_bias == {50256: -100, 7: 0.5}
    assert params.top_k == 0


@pytest.mark.parametrize("names", [[*SAME_NAME, "logit_bias", "stop", "stop_token_ids", "logprobs"]])
def test_null_and_nothing_are_the_defaults(names: list[str]) -> None:
    plain = SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)
    assert sampling() == plain
    assert sampling(**dict.fromkeys(names)) == plain
    assert sampling(logit_bias={}, stop_token_ids=[], stop=[], n=1) == plain


def test_logprobs_count_alternatives() -> None:
    assert sampling(logprobs=True).logprobs == 0
    assert sampling(logprobs=True, top_logprobs=4).logprobs == 4
    assert sampling(logprobs=False).logprobs is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias", "Expected logit_bias to name token ids, but got 'x'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "but got '-1'"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "to name token ids"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "to name token ids"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "an object from token ids to numbers"),
        ({"logit_bias": [1]}, "logit_bias", "an object from token ids to numbers, but got a list"),
        ({"logit_bias": {"1": True}}, "logit_bias", "an object from token ids to numbers"),
        ({"logit_bias": {"1": 101}}, None, "from -100 to 100, but got 101"),
        ({"logit_bias": {"9999999999": 1}}, None, "logit_bias of token ids"),
        ({"n": 17}, None, "n of 1 to 16, but got 17"),
        ({"n": "2"}, "n", "Expected n to be a whole number, but got text"),
        ({"min_p": "x"}, "min_p", "a number"),
        ({"presence_penalty": 3}, None, "presence_penalty of -2 to 2"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids", "a list of token ids"),
        ({"stop_token_ids": [-1]}, None, "stop_token_ids"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "true or false"),
        ({"max_tokens": 3, "min_tokens": 4}, None, "min_tokens of at most max_tokens"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_is_wrong_is_explained(fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        sampling(**fields)
    assert words in caught.value.public_message
    assert (caught.value.param if isinstance(caught.value, FieldError) else None) == param
