"""Prompts of carriers with a memory that come in parts, against one pass with the mask."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmserve import messages as m
from mmserve.sampling import SamplingParams
from tests.workers.carried import LIMITED, MEMORY, Carried, Clip, limited_until, text
from tests.workers.fakes import Engine

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)


def made_up(rng: random.Random) -> Carried:
    """One or two videos, now and then an image before them, and text wherever it may be."""
    clips = [
        Clip(rng.randint(1, 10), rng.randint(1, 7), rng.randint(1, 99), rng.randint(1, 3))
        for _ in range(rng.randint(1, 2))
    ]
    if rng.random() < 0.3:
        clips.insert(0, Clip(0, rng.randint(1, 6), 77))
    ids = [token for clip in clips for token in (*text(rng.randint(0, 3), clip.seed), clip.token)]
    return Carried((*ids, *text(rng.randint(1, 5), 5)), tuple(clips))


def not_begun(item: m.PromptItem) -> m.PromptItem:
    bound = item.lasting_bound and min(item.lasting_bound, MEMORY + 1)
    return m.PromptItem(
        parts=(),
        is_whole=False,
        keep_bound=item.keep_bound,
        lasting_bound=bound,
        frame_rows=item.frame_rows,
    )


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
@pytest.mark.parametrize("seed", range(6))
def test_parts_may_come_at_any_step(tmp_path: Path, seed: int, budget: int) -> None:
    rng = random.Random(seed)
    prompt = made_up(rng)
    engine = Engine(tmp_path, token_budget=budget)
    items = prompt.items(engine)
    there = tuple(map(not_begun, items))
    engine.prefill("r", prompt.token_ids, there, sampling=SAMPLING, methods=LIMITED)
    for at, item in enumerate(items):
        for part in item.parts:
            for _ in range(rng.choice([0, 1, 2, 50])):
                engine.handler.step()
            is_last = part is item.parts[-1]
            engine.handler.handle(
                m.ExtendPrompt(request_id="r", attempt=0, item=at, part=part, is_last=is_last)
            )
    engine.finish()
    assert engine.answer("r") == prompt.answer(4, limited_until(prompt))[0]
    assert not engine.reporter.of(m.RequestFailed)
    assert engine.used_pages == 0
    engine.check()
