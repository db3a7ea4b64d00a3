"""Which tokens survive, as reported by the workers of the embedded model, in one process and in three."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmserve.errors import MMServeError
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.request import Chunk, MediaReport, Methods, RequestOutput
from mmserve.sampling import SamplingParams
from mmserve.show import show_tokens

from .conftest import ask

GRID = 6


def answered(llm: LLM, messages: Any, methods: Methods, *, report: bool = True) -> RequestOutput:  # noqa: ANN401
    news: queue.SimpleQueue[Chunk | RequestOutput | MMServeError] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=2)
    llm.submit(messages, params, deliver=news.put, methods=methods, report_tokens=report)
    while isinstance(latest := news.get(timeout=60), Chunk):
        pass
    assert isinstance(latest, RequestOutput), latest
    return latest


def survivors(report: MediaReport) -> tuple[list[int], list[float]]:
    assert report.tokens is not None
    assert report.tokens.frame_tokens == GRID**2
    kept, weight = report.tokens.kept, report.tokens.weight
    return np.frombuffer(kept, "<i4").tolist(), np.frombuffer(weight, "<f4").tolist()


@pytest.mark.parametrize(
    ("prune", "keep", "share"),
    [
        ("none", 1.0, 1.0),
        ("holitom", 0.25, 0.25),
        ("evs", 0.25, 0.25),
        ("holitom", "3/frame", 3 / GRID**2),
        ("fastv", 0.5, 0.5),
        ("holitom+fastv", 0.5, 0.25),
        ("carriers", 1.0, 1 / GRID**2),
    ],
)
def test_what_is_reported_is_what_was_kept(
    llm: LLM,
    epd: LLM,
    basic_clips: list[tuple[Path, Example]],
    tmp_path: Path,
    prune: str,
    keep: float | str,
    share: float,
) -> None:
    (clip, example), *_ = basic_clips
    messages, methods = ask(clip, example.question.text), Methods(prune=prune, keep=keep)
    done = answered(llm, messages, methods)
    (report,) = done.media
    kept, weight = survivors(report)
    total = report.frames * GRID**2
    assert len(kept) == int(total * share)
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < total
    assert max(weight) <= total
    assert sum(weight) <= total
    if prune == "carriers":
        assert kept == [GRID**2 * frame + GRID**2 - 1 for frame in range(report.frames)]
        assert set(weight) == {GRID**2}
    elif prune != "fastv" and "+" not in prune:
        assert done.usage.visual_tokens_kept == len(kept) + 1
    (there,) = answered(epd, messages, methods).media
    assert there.tokens == report.tokens
    assert answered(llm, messages, methods, report=False).media[0].tokens is None
    out = tmp_path / "out.png"
    show_tokens(messages, llm.options, done.media, out)
    assert out.stat().st_size > 1000
