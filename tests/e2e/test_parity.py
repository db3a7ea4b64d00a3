"""The same greedy tokens and log-probabilities from transformers, one process, and three processes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mmserve.evaluation.oracle import OracleAnswer, TransformersOracle
from mmserve.evaluation.suites import Example, Media, examples
from mmserve.llm import LLM
from mmserve.models.resolve import resolve
from mmserve.request import RequestOutput
from mmserve.sampling import SamplingParams

from .conftest import Conversation, ask

TOKENS = 6
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def oracle() -> TransformersOracle:
    return TransformersOracle(resolve("tiny"))


def _decoded(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _mixed(example: Example) -> tuple[Conversation, list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """A clipworld-mixed question with its media as arrays."""
    content: list[dict[str, Any]] = []
    videos, images = [], []
    for part in example.parts:
        if not isinstance(part, Media):
            content.append({"type": "text", "text": part})
        elif part.modality == "video":
            videos.append(part.frames())
            content.append({"type": "video", "video": videos[-1], "fps": part.fps})
        else:
            images.append(part.frames()[0])
            content.append({"type": "image", "image": images[-1]})
    return [{"role": "user", "content": content}], videos, images


def _check(output: RequestOutput, expected: OracleAnswer) -> None:
    answer = output.outputs[0]
    assert list(output.prompt_token_ids) == expected.prompt_ids
    assert list(answer.token_ids) == expected.token_ids
    assert answer.logprobs is not None
    ours = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert ours == pytest.approx(expected.logprobs, abs=TOLERANCE)


def test_fifty_requests_agree_with_transformers_in_one_process_and_in_three(
    oracle: TransformersOracle, llm: LLM, epd: LLM, basic_clips: list[tuple[Path, Example]]
) -> None:
    asked: list[Conversation] = []
    expected = []
    for clip, example in basic_clips:
        asked.append(ask(clip, example.question.text))
        expected.append(oracle.answer(asked[-1], [_decoded(clip)], [], TOKENS))
    for example in islice(examples("clipworld-mixed", 5), 10):
        messages, videos, images = _mixed(example)
        asked.append(messages)
        expected.append(oracle.answer(messages, videos, images, TOKENS))
    params = SamplingParams(max_tokens=TOKENS, logprobs=0)
    for side in (llm, epd):
        outputs = side.chat(asked, params)
        for output, wanted in zip(outputs, expected, strict=True):
            _check(output, wanted)
