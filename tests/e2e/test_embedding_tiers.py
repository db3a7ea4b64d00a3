"""Embeddings outlive the pipeline that made them, and a tier that is down costs time, not answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mmserve.config import CacheSizes, EmbeddingTiers
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.request import RequestOutput
from mmserve.sampling import SamplingParams
from tests.encoders.servers import real_server

from .conftest import ask

Answer = Callable[[EmbeddingTiers], RequestOutput]


@pytest.fixture
def answer(basic_clips: list[tuple[Path, Example]], monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A pipeline of its own, one question about one clip, and the pipeline's end."""
    clip, example = basic_clips[0]

    def start_and_ask(tiers: EmbeddingTiers) -> RequestOutput:
        monkeypatch.setattr("mmserve.llm.CacheSizes", partial(CacheSizes, embedding_tiers=tiers))
        with LLM(threads=1) as llm:
            (output,) = llm.chat(ask(clip, example.question.text), SamplingParams(max_tokens=8))
        return output

    return start_and_ask


def _share_one_encode(first: RequestOutput, second: RequestOutput) -> None:
    assert first.usage.visual_tokens_cached == 0
    assert second.usage.visual_tokens_cached == second.usage.visual_tokens - 1  # all but the newline
    assert second.timings_ms.encode == 0
    assert second.outputs == first.outputs


def test_after_a_restart_nothing_is_encoded_again(answer: Answer, tmp_path: Path) -> None:
    tiers = EmbeddingTiers(disk_path=str(tmp_path / "cache"), disk_bytes=32 << 20)
    _share_one_encode(answer(tiers), answer(tiers))


def test_two_instances_share_a_redis_server_and_do_without_it(answer: Answer) -> None:
    with real_server() as server:
        tiers = EmbeddingTiers(redis_url=server.url, redis_timeout_s=5.0)
        first = answer(tiers)
        _share_one_encode(first, answer(tiers))
        server.stop()
        alone = answer(tiers)
    assert alone.usage.visual_tokens_cached == 0
    assert alone.outputs == first.outputs
