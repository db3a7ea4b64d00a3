"""What was seen before is not encoded again, and methods change what they say they change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.pruning.base import PRUNERS, make_pruner
from mmserve.request import Methods
from mmserve.sampling import SamplingParams

from .conftest import ask

SHORT = SamplingParams(max_tokens=4)
ENCODER_SIDE = [name for name in PRUNERS if name != "none" and make_pruner(name, 1.0).acts_at == "encoder"]


def test_a_second_question_about_a_clip_spends_no_encode_time(
    epd: LLM, basic_clips: list[tuple[Path, Example]], tmp_path: Path
) -> None:
    clip = tmp_path / "fresh.mp4"
    # other bytes, so no other test can have put it into the cache
    clip.write_bytes(basic_clips[0][0].read_bytes() + b"\0")
    (first,) = epd.chat(ask(clip, "What colour is the star?"), SHORT)
    (second,) = epd.chat(ask(clip, "How many objects are there?"), SHORT)
    assert first.usage.visual_tokens_cached == 0
    assert first.timings_ms.encode > 0
    assert second.usage.visual_tokens_cached == second.usage.visual_tokens - 1  # all but the newline
    assert second.timings_ms.encode == 0
    assert second.timings_ms.preprocess == 0


@pytest.mark.parametrize("prune", ENCODER_SIDE)
def test_reduction_shortens_the_prompt_by_what_was_planned(
    epd: LLM, basic_clips: list[tuple[Path, Example]], prune: str
) -> None:
    clip, example = basic_clips[1]
    methods = Methods(prune=prune, keep=0.25)
    pruner = make_pruner(prune, 0.25)
    planned = pruner.plan(8, 36) + 1
    (output,) = epd.chat(ask(clip, example.question.text), SHORT, methods=methods)
    assert output.usage.visual_tokens == 8 * 36 + 1
    assert planned == 8 * 36 // 4 + 1
    assert output.usage.visual_tokens_kept == planned or pruner.count == "bound"
    assert 8 <= output.usage.visual_tokens_kept <= planned
    assert output.outputs[0].text
    # prompt_token_ids are the uncompressed prompt whatever was kept
    assert len(output.prompt_token_ids) == output.usage.prompt_tokens


@pytest.mark.parametrize("kv", ["snapkv", "random"])
def test_kv_compression_frees_the_share_it_was_told_to(
    epd: LLM, llm: LLM, basic_clips: list[tuple[Path, Example]], kv: str
) -> None:
    clip, example = basic_clips[2]
    methods = Methods(kv=kv, kv_budget=0.25)
    for side in (epd, llm):
        (output,) = side.chat(ask(clip, example.question.text), SHORT, methods=methods)
        (dense,) = side.chat(ask(clip, example.question.text), SHORT)
        usage = output.usage
        assert usage.kv_bytes_uncompressed == dense.usage.kv_bytes == dense.usage.kv_bytes_uncompressed
        dropped = 1 - usage.kv_bytes / usage.kv_bytes_uncompressed
        visual = usage.visual_tokens / usage.prompt_tokens
        assert dropped == pytest.approx(0.75 * visual, abs=0.01)


def test_snapkv_with_the_whole_budget_changes_no_token(
    epd: LLM, basic_clips: list[tuple[Path, Example]]
) -> None:
    for clip, example in basic_clips[:8]:
        question = ask(clip, example.question.text)
        (dense,) = epd.chat(question, SHORT)
        (kept,) = epd.chat(question, SHORT, methods=Methods(kv="snapkv", kv_budget=1.0))
        assert kept.outputs == dense.outputs


def test_timings_add_up(epd: LLM, basic_clips: list[tuple[Path, Example]]) -> None:
    (output,) = epd.chat(ask(basic_clips[3][0], "Count the objects."), SHORT)
    t = output.timings_ms
    parts = (t.fetch, t.decode, t.preprocess, t.encode, t.prune, t.transfer, t.queue, t.prefill, t.other)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(t.ttft, abs=1.0)


def test_arrays_are_taken_as_sampled(llm: LLM) -> None:
    frames = np.zeros((3, 60, 90, 3), np.uint8)
    content = [{"type": "video", "video": frames, "fps": 2.0}, {"type": "text", "text": "What is this?"}]
    (output,) = llm.chat([{"role": "user", "content": content}], SHORT)
    assert output.media[0].frames == 3
    assert output.media[0].timestamps_s == (0.0, 0.5, 1.0)
    assert (output.media[0].width, output.media[0].height) == (90, 60)
