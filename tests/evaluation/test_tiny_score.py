"""Scoring all answer tokens at once says what generation with transformers says."""

from __future__ import annotations

from itertools import islice

import pytest

from mmserve.evaluation.oracle import TransformersOracle, judge
from mmserve.evaluation.suites import examples
from mmserve.evaluation.tiny_model import build_tokenizer
from mmserve.evaluation.tiny_rows import TinyTokenizer
from mmserve.evaluation.tiny_score import score_suite
from mmserve.models.resolve import resolve


@pytest.fixture(scope="module")
def oracle() -> TransformersOracle:
    return TransformersOracle(resolve("tiny"))


@pytest.mark.parametrize("suite", ["clipworld-mixed", "clipworld-stream"])
@pytest.mark.parametrize("carriers", [False, True])
def test_the_same_verdicts(oracle: TransformersOracle, suite: str, carriers: bool) -> None:
    count = 2
    generated = judge(oracle, islice(examples(suite, 5), count), "carriers" if carriers else "all")
    words = TinyTokenizer(build_tokenizer())
    scored = score_suite(oracle.model, words, suite, seed=5, limit=count, carriers=carriers)
    assert scored == generated


def test_questions_without_most_of_their_media(oracle: TransformersOracle) -> None:
    example = next(examples("clipworld-mixed", 5))
    whole = oracle.ask(example)
    for view in ("random", "one-frame", "blind"):
        assert oracle.ask(example, view=view).token_ids
    blind = oracle.ask(example, view="blind")
    assert len(blind.prompt_ids) < len(whole.prompt_ids)
    assert oracle.ask(example, view="random") == oracle.ask(example, view="random")
