"""The tower's first phase: what is asked of its tokens, and that all of it teaches the tower alone."""

from __future__ import annotations

import numpy as np
import torch

from mmserve.evaluation.clipworld import render, sample_scene
from mmserve.evaluation.tiny_data import token_labels
from mmserve.evaluation.tiny_model import DRAFT, build_config, build_model, build_tokenizer
from mmserve.evaluation.train_tower import TowerTask, token_colours


def test_colours_under_tokens_are_those_of_the_quarters() -> None:
    frames = torch.zeros(1, 3, 144, 144)
    frames[0, 1, 24 + 12 : 24 + 24, 48 : 48 + 12] = 1.0  # green below left, in the second row's third token
    colours = token_colours(frames)
    assert colours.shape == (1, 36, 12)
    assert colours[0, 6 + 2].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert float(colours.sum()) == 1.0


def test_the_tower_learns_and_the_words_stay() -> None:
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer, DRAFT), 0)
    task = TowerTask(model, tokenizer)
    scene = sample_scene(np.random.default_rng(0), "colour", 2)
    loss, scores = task.loss(render(scene), token_labels([scene]))
    loss.backward()
    assert set(scores) == {"colour", "look"}
    taught = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert any("vision_tower" in name for name in taught)
    assert not any("language_model" in name for name in taught)
    assert {"paint.weight", "place.weight", "offset.weight"} <= taught
