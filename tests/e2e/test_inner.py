"""Visual tokens that are dropped between layers of the embedded model, in one process and in three."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from mmserve.errors import BadRequest
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.methods import INNER, WITH_WEIGHTS
from mmserve.models.resolve import resolve
from mmserve.request import Methods, Option, RequestOutput
from mmserve.sampling import SamplingParams
from tests.pruning.predictors import HEADS, write_predictor

from .conftest import Conversation, ask

CLIPS = 8
LAYERS = 6
PARAMS = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def asked(basic_clips: list[tuple[Path, Example]]) -> list[Conversation]:
    return [ask(clip, example.question.text) for clip, example in basic_clips[:CLIPS]]


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a made-up predictor for the embedded model."""
    config = json.loads((resolve("tiny") / "config.json").read_text(encoding="utf-8"))
    hidden = config["text_config"]["hidden_size"]
    return write_predictor(tmp_path_factory.mktemp("weights") / "predictor.safetensors", hidden)


def methods_of(prune: str, keep: float, weights: str) -> Methods:
    name = prune.rpartition("+")[2]
    before = f"{name}." if name != prune else ""
    options: dict[str, Option] = {}
    if name in WITH_WEIGHTS:
        options = {f"{before}weights": weights, f"{before}heads": HEADS}
    return Methods(prune=prune, keep=keep, prune_options=options)


def test_to_keep_everything_is_to_answer_as_ever(llm: LLM, asked: list[Conversation], weights: str) -> None:
    dense = tokens(llm.chat(asked, PARAMS))
    for name in INNER:
        assert tokens(llm.chat(asked, PARAMS, methods=methods_of(name, 1.0, weights))) == dense


@pytest.mark.parametrize("prune", [*INNER, *(f"holitom+{name}" for name in INNER)])
def test_three_processes_answer_as_one(
    llm: LLM, epd: LLM, asked: list[Conversation], weights: str, prune: str
) -> None:
    methods = methods_of(prune, 0.5, weights)
    here, there = (side.chat(asked, PARAMS, methods=methods) for side in (llm, epd))
    assert tokens(here) == tokens(there)
    # another time, with others: what is cached must change nothing
    assert tokens(llm.chat(asked[::-1], PARAMS, methods=methods))[::-1] == tokens(here)
    for output in (*here, *there):
        usage = output.usage
        enters = usage.visual_tokens if prune in INNER else (usage.visual_tokens - 1) // 2 + 1
        assert usage.visual_tokens_kept == enters
        assert usage.visual_tokens_layer_mean < usage.visual_tokens_kept
        assert usage.kv_bytes < usage.kv_bytes_uncompressed


def test_fastv_on_the_embedded_model(llm: LLM, basic_clips: list[tuple[Path, Example]]) -> None:
    (clip, example), *_ = basic_clips
    (output,) = llm.chat(ask(clip, example.question.text), PARAMS, methods=Methods(prune="fastv", keep=0.25))
    usage, output_methods = output.usage, output.methods
    reducible = usage.visual_tokens - 1
    assert usage.visual_tokens_layer_mean == pytest.approx(
        (2 * usage.visual_tokens + 4 * (reducible // 4 + 1)) / LAYERS
    )
    assert msgspec.structs.asdict(output_methods)["prune"] == "fastv"


def test_the_prompts_log_probabilities_are_refused(llm: LLM, asked: list[Conversation]) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with pytest.raises(BadRequest, match="prompt_logprobs with prune fastv"):
        llm.chat(asked[0], params, methods=Methods(prune="fastv", keep=0.5))
