"""Sparse attention on the embedded model: every pattern with everything to see answers as dense does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mmserve.attention import sparse
from mmserve.attention.base import PATTERNS, PROFILE, load_pattern
from mmserve.errors import BadRequest
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.request import Methods, Option, RequestOutput
from mmserve.sampling import SamplingParams

from .conftest import Conversation, ask

CLIPS = 4
LAYERS = 6
PARAMS = SamplingParams(max_tokens=6)
SPARSE = Methods(
    attention="a_shape", attention_options={"sink": 16, "local_frames": 2}, attention_dense_below=0
)


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of everything is run as it is too; of the pipeline in this process."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 2.0)


@pytest.fixture(scope="module")
def asked(basic_clips: list[tuple[Path, Example]]) -> list[Conversation]:
    return [ask(clip, example.question.text) for clip, example in basic_clips[:CLIPS]]


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def everything(name: str) -> Methods:
    pattern = load_pattern(name).everything()
    options: dict[str, Option] = {
        field.name: value
        for field in dataclasses.fields(pattern)
        if field.name != PROFILE and (value := getattr(pattern, field.name)) != field.default
    }
    return Methods(attention=name, attention_options=options, attention_dense_below=0)


@pytest.mark.parametrize("name", PATTERNS)
def test_to_see_everything_is_to_answer_as_ever(llm: LLM, asked: list[Conversation], name: str) -> None:
    dense = tokens(llm.chat(asked, PARAMS))
    assert tokens(llm.chat(asked, PARAMS, methods=everything(name))) == dense


def test_three_processes_answer_as_one_and_say_how_much_they_computed(
    llm: LLM, epd: LLM, asked: list[Conversation]
) -> None:
    here, there = (side.chat(asked, PARAMS, methods=SPARSE) for side in (llm, epd))
    assert tokens(here) == tokens(there)
    assert tokens(llm.chat(asked[::-1], PARAMS, methods=SPARSE))[::-1] == tokens(here)
    for output in there:
        first, *others = output.usage.attention_density
        assert len(others) == LAYERS - 1
        assert first == 1
        assert all(0 < density < 1 for density in others)
        assert output.usage.attention_recall == ()
        assert output.attention is None


def test_carriers_say_themselves_what_is_seen(llm: LLM, asked: list[Conversation]) -> None:
    with pytest.raises(BadRequest, match="Expected attention dense with prune carriers"):
        LLM(prune="carriers", attention="a_shape")
    with pytest.raises(BadRequest, match="settings of a_shape"):
        llm.chat(asked[0], PARAMS, methods=Methods(attention="a_shape", attention_options={"sinc": 1}))
