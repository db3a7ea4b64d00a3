"""`prune="carriers"` end to end against transformers with VideoScan's mask: one process, three, in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmserve.errors import BadRequest
from mmserve.evaluation.clipworld import SIDE
from mmserve.evaluation.oracle import OracleAnswer, Pixels, TransformersOracle
from mmserve.llm import LLM
from mmserve.models.resolve import resolve
from mmserve.request import Methods, RequestOutput
from mmserve.sampling import SamplingParams

from .conftest import Conversation

TOKENS = 12
TOLERANCE = 1e-4
FRAME_TOKENS = 36
CARRIERS = Methods(prune="carriers")
PARAMS = SamplingParams(max_tokens=TOKENS, logprobs=0)


class Asked:
    """A question about random clips of so many frames, with text between them, and maybe an image."""

    def __init__(self, *frames: int, image: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, *frames])
        self.videos: list[Pixels] = [
            rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8) for count in frames
        ]
        self.images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)] if image else []
        content: list[dict[str, Any]] = [{"type": "text", "text": "Look."}]
        for video in self.videos:
            content += [{"type": "video", "video": video, "fps": 2.0}, {"type": "text", "text": "And then?"}]
        content += [{"type": "image", "image": image} for image in self.images]
        self.messages: Conversation = [
            {"role": "user", "content": [*content, {"type": "text", "text": "What colour is the star?"}]}
        ]

    def check(self, output: RequestOutput, expected: OracleAnswer) -> None:
        answer, usage = output.outputs[0], output.usage
        assert list(output.prompt_token_ids) == expected.prompt_ids
        assert list(answer.token_ids) == expected.token_ids
        assert answer.logprobs is not None
        ours = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert ours == pytest.approx(expected.logprobs, abs=TOLERANCE)
        dropped = sum(map(len, self.videos)) * (FRAME_TOKENS - 1)
        assert usage.visual_tokens - usage.visual_tokens_kept == dropped
        lasting = usage.prompt_tokens - dropped
        assert usage.kv_bytes * usage.prompt_tokens == usage.kv_bytes_uncompressed * lasting


ASKED = (Asked(1), Asked(3), Asked(16), Asked(5, 5), Asked(4, image=True))


@pytest.fixture(scope="module")
def expected() -> list[OracleAnswer]:
    oracle = TransformersOracle(resolve("tiny"))
    return [
        oracle.answer_from_carriers(asked.messages, asked.videos, asked.images, TOKENS) for asked in ASKED
    ]


def test_one_process_and_three_answer_as_transformers_does(
    llm: LLM, epd: LLM, expected: list[OracleAnswer]
) -> None:
    for side in (llm, epd):
        outputs = side.chat([asked.messages for asked in ASKED], PARAMS, methods=CARRIERS)
        for asked, output, wanted in zip(ASKED, outputs, expected, strict=True):
            asked.check(output, wanted)


@pytest.mark.parametrize("rows", [7, 64])
def test_chunks_of_any_size_give_the_same(rows: int, expected: list[OracleAnswer]) -> None:
    with LLM(threads=1, max_num_batched_tokens=rows, prune="carriers") as llm:
        outputs = llm.chat([asked.messages for asked in ASKED], PARAMS)
    for asked, output, wanted in zip(ASKED, outputs, expected, strict=True):
        asked.check(output, wanted)


def test_a_second_question_does_not_prefill_the_video_again(llm: LLM) -> None:
    asked = Asked(40, seed=1)
    first = llm.chat(asked.messages, PARAMS, methods=CARRIERS)[0]
    asked.messages[0]["content"][-1]["text"] = "Where is the square?"
    second = llm.chat(asked.messages, PARAMS, methods=CARRIERS)[0]
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 32, "pages of 32 slots, one per frame"
    assert second.usage.visual_tokens_cached == 40 * FRAME_TOKENS


def test_a_share_to_keep_is_refused(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="Expected no keep with prune carriers"):
        LLM(prune="carriers", keep=0.5)
    with pytest.raises(BadRequest, match="Expected no keep with prune carriers"):
        llm.chat(ASKED[0].messages, PARAMS, methods=Methods(prune="carriers", keep=0.5))


def test_a_long_video_fits_where_its_tokens_would_not() -> None:
    asked = Asked(96, seed=2)
    # 1365 slots, where the video alone has 3457 tokens
    with LLM(threads=1, kv_memory=8 << 20, max_num_batched_tokens=256) as llm:
        (output,) = llm.chat(asked.messages, PARAMS, methods=CARRIERS)
        assert output.usage.visual_tokens_kept == 97
        with pytest.raises(BadRequest, match="Expected a prompt of at most"):
            llm.chat(asked.messages, PARAMS)
