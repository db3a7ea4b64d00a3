"""Pools of training items: what a step may use depends on the step alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from mmserve.encoders.siglip import SiglipEncoder
from mmserve.evaluation import tiny_pools
from mmserve.evaluation.clipworld import render, sample_scene
from mmserve.evaluation.curriculum import Lesson
from mmserve.evaluation.tiny_data import pixels
from mmserve.evaluation.tiny_model import DRAFT, build_config, build_model, build_tokenizer
from mmserve.evaluation.tiny_pools import Pools, Supply, embed_clip

MODEL = build_model(build_config(build_tokenizer(), DRAFT), 0)


class Inline:
    """A pool of processes without processes; makes nothing but the items' numbers."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, _: Callable[..., Any], __: int, lesson: Lesson, start: int, stop: int) -> Future[Any]:
        made: Future[Any] = Future()
        nothing = np.zeros(1, np.int16)
        made.set_result(
            [(f"{lesson} {index}", nothing, nothing.astype(np.float32)) for index in range(start, stop)]
        )
        return made

    def shutdown(self, *, cancel_futures: bool) -> None:
        self.closed = cancel_futures


def pools() -> Pools:
    return Pools(0, {"clip": Supply(4, 2, 3), "image": Supply(2, 5, 1)}, MODEL, 1)


def names(made: Pools, lesson: Lesson) -> set[str]:
    rng = np.random.default_rng(0)
    return {str(made.draw(lesson, rng).scene) for _ in range(300)}


def test_a_run_that_was_stopped_sees_what_an_uninterrupted_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_pools, "ProcessPoolExecutor", Inline)
    straight = pools()
    for step in range(12):
        straight.advance(step)
        resumed = pools()
        resumed.advance(step)
        for lesson in ("clip", "image"):
            assert names(straight, lesson) == names(resumed, lesson)
    # chunks 3 to 5 of four items are in use at step 11
    assert names(straight, "clip") == {f"clip {index}" for index in range(12, 24)}
    straight.close()


def test_embeddings_of_clips_and_pictures() -> None:
    clip = render(sample_scene(np.random.default_rng(0), "colour", 3))
    video = embed_clip(MODEL, clip, image=False)
    assert video.tokens.shape == (3, 36, 128)
    assert video.saliency.shape == (3, 36)
    picture = embed_clip(MODEL, clip[:1], image=True)
    assert picture.tokens.shape == (144, 128)
    assert picture.saliency.shape == (144,)
    assert picture.tokens.dtype == torch.bfloat16


def test_what_is_salient_is_what_the_server_finds_salient() -> None:
    encoder = SiglipEncoder(MODEL.config)
    inner = MODEL.model
    encoder.tower.load_state_dict(inner.vision_tower.state_dict(), strict=False)  # its last norm is unused
    encoder.projector.load_state_dict(inner.multi_modal_projector.state_dict())
    clip = render(sample_scene(np.random.default_rng(1), "colour", 3))
    served = encoder.frames(encoder.features(pixels(clip)))
    made = embed_clip(MODEL, clip, image=False)
    assert torch.allclose(made.saliency, served.saliency, rtol=0.02)
    assert torch.allclose(made.tokens.float(), served.embeddings, atol=0.05)
