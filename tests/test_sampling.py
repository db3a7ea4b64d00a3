"""SamplingParams: defaults that change nothing, ranges with clear refusals, a form that travels."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmserve.errors import BadRequest
from mmserve.sampling import SamplingParams

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 16),
    "max_tokens": st.integers(100, 65536),
    "min_tokens": st.integers(0, 64),
    "temperature": st.floats(0, 10) | st.integers(0, 10),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.none() | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=20),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "stop": st.none() | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=16),
    "stop_token_ids": st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=20),
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "logprobs": st.none() | st.integers(0, 20),
    "prompt_logprobs": st.none() | st.integers(0, 20),
}
VALID: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({}, optional=FIELDS).filter(
    lambda params: params.get("n", 1) == 1 or params.get("temperature", 0) > 0
)


@given(VALID)
def test_valid_parameters_survive_the_journey(given_params: dict[str, Any]) -> None:
    params = SamplingParams(**given_params)
    for codec in (msgspec.msgpack, msgspec.json):
        assert codec.decode(codec.encode(params), type=SamplingParams) == params


def test_lists_and_vllms_names_for_nothing_are_understood() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], top_k=-1)  # type: ignore[arg-type]  # as users do
    assert (params.stop, params.stop_token_ids, params.top_k) == (("end",), (3, 4), 0)
    nothing = SamplingParams(stop=None, stop_token_ids=None)  # type: ignore[arg-type]  # vLLM's defaults
    assert nothing == SamplingParams()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "Expected n of 1 to 16, but got 0"),
    ({"n": 17}, "Expected n of 1 to 16"),
    ({"n": 2}, "Expected n of 1 with temperature 0"),
    ({"n": 2.0}, "Expected n as a whole number, but got float"),
    ({"max_tokens": 0}, "max_tokens of 1 to 65536"),
    ({"max_tokens": True}, "max_tokens as a whole number, but got bool"),
    ({"max_tokens": None}, "max_tokens as a whole number"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens of at most max_tokens, 5, but got 6"),
    ({"min_tokens": -1}, "min_tokens of 0"),
    ({"temperature": -0.1}, "temperature of 0 to 10, but got -0.1"),
    ({"temperature": "hot"}, "temperature as a number, but got str"),
    ({"top_p": 0}, "top_p of above 0"),
    ({"top_p": 1.01}, "top_p of 0 to 1"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 1.5}, "min_p of 0 to 1, but got 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty of 0.01 to 100, but got 0"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty of -2 to 2, but got 2.1"),
    ({"frequency_penalty": -2.1}, "frequency_penalty of -2 to 2"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"logprobs": 21}, "logprobs of 0 to 20"),
    ({"logprobs": True}, "logprobs as a whole number"),
    ({"prompt_logprobs": -1}, "prompt_logprobs of 0 to 20"),
    ({"ignore_eos": 1}, "ignore_eos as true or false, but got int"),
    ({"include_stop_str_in_output": None}, "include_stop_str_in_output as true or false"),
    ({"stop": 5}, "stop as a list of texts, but got int"),
    ({"stop": [5]}, "stop as text or a list of texts"),
    ({"stop": ["x"] * 17}, "stop of at most 16 strings, but got 17"),
    ({"stop_token_ids": 5}, "stop_token_ids as a list of token ids, but got int"),
    ({"stop_token_ids": [-1]}, "stop_token_ids of token ids, 0 or more, but got -1"),
    ({"stop_token_ids": [True]}, "stop_token_ids of token ids"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids of token ids"),
    ({"stop_token_ids": [0] * 1025}, "stop_token_ids of at most 1024 token ids, but got 1025"),
    ({"logit_bias": [1]}, "logit_bias from token ids to numbers, but got list"),
    ({"logit_bias": {"1": 1.0}}, "logit_bias of token ids, 0 or more, but got '1'"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias of token ids, 0 or more, but got -1"),
    ({"logit_bias": {1: 100.5}}, "logit_bias of numbers from -100 to 100, but got 100.5"),
    ({"logit_bias": {1: "x"}}, "logit_bias of numbers from -100 to 100, but got 'x'"),
    ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias of at most 1024 token ids"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=[str(case[0])[:40] for case in WRONG])
def test_what_is_wrong_is_named_with_what_was_expected(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**wrong)
    assert words in caught.value.public_message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias"],
)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    wrong: dict[str, Any] = {"logit_bias": {1: value}} if name == "bias" else {name: value}
    with pytest.raises(BadRequest, match=f"{name}.*{value}"):
        SamplingParams(**wrong)
